// AVX2, FMA, F16C: 32 look-ups an instruction in a table of 16 bytes, or 8 in one of floats.
#define NOMUL_NAMESPACE nomul_avx2
#include "kernels.h"
#include "lanes_avx2.h"
#include "dense.h"
#include "hadamard.h"
#include "rounding.h"
#include "rows.h"

namespace NOMUL_NAMESPACE {

// Bytes ahead of a read that are asked for: what one core's stream from memory needs to run on.
constexpr int kAhead = 4096;

// The sums that eight rows select with nibble N of their signs; table: those whose fourth input is subtracted, of which
// the other eight are the negatives; folded: the signs, in each nibble relative to the fourth.
template <int N>
static inline __m256 selected(__m256i bits, __m256i folded, __m256 table) {
  const __m256i index = N ? _mm256_srli_epi32(folded, 4 * N) : folded;
  const __m256i sign = _mm256_and_si256(_mm256_slli_epi32(bits, 28 - 4 * N), _mm256_set1_epi32((int)0x80000000u));
  return _mm256_xor_ps(_mm256_permutevar8x32_ps(table, index), _mm256_castsi256_ps(sign));
}

static inline __m256 chunk_sum(__m256i v, const float* t) {
  const __m256i fourth = _mm256_and_si256(_mm256_srli_epi32(v, 3), _mm256_set1_epi32(0x11111111));
  const __m256i w = _mm256_xor_si256(v, _mm256_sub_epi32(_mm256_slli_epi32(fourth, 3), fourth));
  __m256 a = selected<0>(v, w, _mm256_loadu_ps(t)), b = selected<1>(v, w, _mm256_loadu_ps(t + 16));
  a = _mm256_add_ps(a, selected<2>(v, w, _mm256_loadu_ps(t + 32)));
  b = _mm256_add_ps(b, selected<3>(v, w, _mm256_loadu_ps(t + 48)));
  a = _mm256_add_ps(a, selected<4>(v, w, _mm256_loadu_ps(t + 64)));
  b = _mm256_add_ps(b, selected<5>(v, w, _mm256_loadu_ps(t + 80)));
  a = _mm256_add_ps(a, selected<6>(v, w, _mm256_loadu_ps(t + 96)));
  b = _mm256_add_ps(b, selected<7>(v, w, _mm256_loadu_ps(t + 112)));
  return _mm256_add_ps(a, b);
}

struct FloatSums {
  static constexpr int64_t kTableBytes = kFloatTableBytes;
  static constexpr bool kWholeTiles = false;

  template <int P, int R, int M>
  NOMUL_INLINE void block(const uint8_t* signs, int chunks, const Token* tokens, Floats (*sums)[M][P]) {
    for (int r = 0; r < R; r++)
      for (int m = 0; m < M; m++)
        for (int p = 0; p < P; p++) {
          Floats total = sums[r][m][p];
          for (int c = 0; c < chunks; c++) {
            const float* t = (const float*)(tokens[m].tables + c * kTableBytes);
            const __m256i* bits = (const __m256i*)(signs + ((c * P + p) * kHalves + r) * 64);
            prefetch((const char*)bits + kAhead);
            total.a = _mm256_add_ps(total.a, chunk_sum(_mm256_loadu_si256(bits), t));
            total.b = _mm256_add_ps(total.b, chunk_sum(_mm256_loadu_si256(bits + 1), t));
          }
          sums[r][m][p] = total;
        }
  }
};

// Byte i of the signs of 32 rows, for all four; in each lane rows 0-3, 8-11, 16-19 and 24-27, in the second from 4 on.
struct Bytes {
  __m256i at[4];
};

NOMUL_INLINE Bytes bytes_of(const uint8_t* first, const uint8_t* second) {
  const __m256i turn = _mm256_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15,  //
                                        0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  const auto rows = [&](const uint8_t* p) {
    return _mm256_shuffle_epi8(_mm256_loadu_si256((const __m256i*)p), turn);
  };
  const __m256i a = rows(first), b = rows(first + 32), c = rows(second), d = rows(second + 32);
  const __m256i ab = _mm256_unpacklo_epi32(a, b), cd = _mm256_unpacklo_epi32(c, d);
  const __m256i ab_high = _mm256_unpackhi_epi32(a, b), cd_high = _mm256_unpackhi_epi32(c, d);
  return {{_mm256_unpacklo_epi64(ab, cd), _mm256_unpackhi_epi64(ab, cd), _mm256_unpacklo_epi64(ab_high, cd_high),
           _mm256_unpackhi_epi64(ab_high, cd_high)}};
}

// Sums of unsigned bytes of 32 rows, as those of pairs of rows modulo 2^16 and of the odd ones.
struct PairSums {
  __m256i pairs, odd;
};

NOMUL_INLINE void add_looked_up(const uint8_t* table16, __m256i nibbles, PairSums& sums) {
  const __m256i table = _mm256_broadcastsi128_si256(_mm_load_si128((const __m128i*)table16));
  const __m256i found = _mm256_shuffle_epi8(table, nibbles);
  sums.pairs = _mm256_add_epi16(sums.pairs, found);
  sums.odd = _mm256_add_epi16(sums.odd, _mm256_maddubs_epi16(found, _mm256_set1_epi16(0x0100)));
}

// Sums of rows as words, those of the first half of a tile and of the second, in the order of `Bytes`.
struct RowSums {
  __m256i half[2];
};

NOMUL_INLINE RowSums rows_of(const PairSums& sums) {
  const __m256i even = _mm256_sub_epi16(sums.pairs, _mm256_slli_epi16(sums.odd, 8));
  return {{_mm256_unpacklo_epi16(even, sums.odd), _mm256_unpackhi_epi16(even, sums.odd)}};
}

// Eight rows' sums of low bytes and of high ones, side by side, as floats; `bias` is what the entries' being unsigned
// has added.
NOMUL_INLINE __m256 joined(__m256i both, __m256i bias) {
  const __m256i whole = _mm256_madd_epi16(both, _mm256_set1_epi32(0x01000001));
  return _mm256_cvtepi32_ps(_mm256_sub_epi32(whole, bias));
}

// Tables of whole numbers in bytes, offset to be unsigned: 16 for each nibble of a row's signs. Two: low bytes of 16-bit
// sums, each table followed by that of the high bytes, so that activations keep 14 bits.
template <bool Two>
struct ByteSums {
  static constexpr int kEntryBytes = Two ? 2 : 1;
  static constexpr int64_t kTableBytes = kChunk / 4 * 16 * kEntryBytes;
  static constexpr bool kWholeTiles = true;
  // What the entries that a chunk takes are offset by.
  static constexpr int kBias = kChunk / 4 * (Two ? 32768 : 128);

  // Add the sums of one plane, whose signs of both halves are `step` bytes apart from chunk to chunk.
  template <int M>
  NOMUL_INLINE void plane(const uint8_t* signs, int step, int chunks, const Token* tokens, Floats* (&out)[2][M]) {
    PairSums low[M], high[M];
#pragma GCC unroll 2
    for (int m = 0; m < M; m++) low[m] = high[m] = {_mm256_setzero_si256(), _mm256_setzero_si256()};
    for (int c = 0; c < chunks; c++, signs += step) {
      prefetch(signs + kAhead);
      prefetch(signs + kAhead + 64);
      const Bytes bytes = bytes_of(signs, signs + 64);
#pragma GCC unroll 8
      for (int n = 0; n < 8; n++) {
        const __m256i byte = bytes.at[n / 2], mask = _mm256_set1_epi8(15);
        const __m256i nibbles = _mm256_and_si256(n % 2 ? _mm256_srli_epi16(byte, 4) : byte, mask);
#pragma GCC unroll 2
        for (int m = 0; m < M; m++) {
          const uint8_t* table = tokens[m].tables + c * kTableBytes + n * 16 * kEntryBytes;
          add_looked_up(table, nibbles, low[m]);
          if constexpr (Two) add_looked_up(table + 16, nibbles, high[m]);
        }
      }
    }
    const __m256i bias = _mm256_set1_epi32(kBias * chunks);
#pragma GCC unroll 2
    for (int m = 0; m < M; m++) {
      const RowSums a = rows_of(low[m]), b = rows_of(high[m]);
#pragma GCC unroll 2
      for (int r = 0; r < 2; r++) {
        const Floats sum = {joined(_mm256_unpacklo_epi16(a.half[r], b.half[r]), bias),
                            joined(_mm256_unpackhi_epi16(a.half[r], b.half[r]), bias)};
        *out[r][m] = fma(sum, all(*tokens[m].factors), *out[r][m]);
      }
    }
  }

  template <int P, int R, int M>
  NOMUL_INLINE void block(const uint8_t* signs, int chunks, const Token* tokens, Floats (*sums)[M][P]) {
    static_assert(R == kHalves, "rows are looked up a tile at a time");
    for (int p = 0; p < P; p++) {
      Floats* out[2][M];
      for (int m = 0; m < M; m++) out[0][m] = &sums[0][m][p], out[1][m] = &sums[1][m][p];
      plane<M>(signs + p * kHalves * 64, P * kHalves * 64, chunks, tokens, out);
    }
  }
};

// All sums of four numbers with signs, eight entries an instruction: entry c takes +x[b] where c has bit b, -x[b]
// elsewhere; times scale.
struct FourSums {
  __m256 sign[3], up;
  explicit FourSums(float scale) : up(_mm256_set1_ps(scale)) {
    const __m256i entry = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    for (int b = 0; b < 3; b++) {
      const __m256i has = _mm256_slli_epi32(entry, 31 - b);
      sign[b] = _mm256_blendv_ps(_mm256_set1_ps(-scale), up, _mm256_castsi256_ps(has));
    }
  }
  Floats operator()(const float* x) const {
    __m256 three = _mm256_mul_ps(_mm256_broadcast_ss(x), sign[0]);
    three = _mm256_fmadd_ps(_mm256_broadcast_ss(x + 1), sign[1], three);
    three = _mm256_fmadd_ps(_mm256_broadcast_ss(x + 2), sign[2], three);
    const __m256 fourth = _mm256_mul_ps(_mm256_broadcast_ss(x + 3), up);
    return {_mm256_sub_ps(three, fourth), _mm256_add_ps(three, fourth)};
  }
  // As int16, in their order.
  __m256i whole(const float* x) const {
    const Floats sums = (*this)(x);
    const __m256i packed = _mm256_packs_epi32(_mm256_cvtps_epi32(sums.a), _mm256_cvtps_epi32(sums.b));
    return _mm256_permute4x64_epi64(packed, 0xD8);
  }
};

// The greatest of these sums in a block.
static inline float largest(const float* x, int chunks) {
  __m256 top = _mm256_setzero_ps();
  for (int i = 0; i < chunks * kChunk; i += 8) {
    const __m256 size = _mm256_andnot_ps(_mm256_set1_ps(-0.0f), _mm256_load_ps(x + i));
    const __m256 pair = _mm256_add_ps(size, _mm256_permute_ps(size, 0xB1));
    top = _mm256_max_ps(top, _mm256_add_ps(pair, _mm256_permute_ps(pair, 0x4E)));
  }
  return _mm_cvtss_f32(_mm_max_ss(_mm256_castps256_ps128(top), _mm256_extractf128_ps(top, 1)));
}

static void exact_tables(const float* x, int chunks, uint8_t* tables, float* factor) {
  const FourSums sums(1.0f);
  for (int n = 0; n < chunks * kChunk / 4; n++) store((float*)tables + 16 * n, sums(x + 4 * n), kLanes);
  *factor = 1.0f;
}

// Round the sums of a block to 16 bits: 32766 stands for the largest of them.
static void two_byte_tables(const float* x, int chunks, uint8_t* tables, float* factor) {
  const float top = largest(x, chunks), scale = scale_to(32766.0f, top);
  const FourSums sums(scale);
  const __m256i bias = _mm256_set1_epi16((short)0x8000), byte = _mm256_set1_epi16(255);
  for (int n = 0; n < chunks * kChunk / 4; n++) {
    const __m256i words = _mm256_xor_si256(sums.whole(x + 4 * n), bias);
    const __m256i bytes = _mm256_packus_epi16(_mm256_and_si256(words, byte), _mm256_srli_epi16(words, 8));
    _mm256_store_si256((__m256i*)(tables + 32 * n), _mm256_permute4x64_epi64(bytes, 0xD8));
  }
  *factor = inverse(scale, top);
}

// The same to 8 bits: 127 stands for the largest sum.
static void byte_tables(const float* x, int chunks, uint8_t* tables, float* factor) {
  const float top = largest(x, chunks), scale = scale_to(127.0f, top);
  const FourSums sums(scale);
  const __m256i bias = _mm256_set1_epi16(128);
  for (int n = 0; n < chunks * kChunk / 4; n++) {
    const __m256i words = _mm256_add_epi16(sums.whole(x + 4 * n), bias);
    const __m256i bytes = _mm256_permute4x64_epi64(_mm256_packus_epi16(words, words), 0xD8);
    _mm_store_si128((__m128i*)(tables + 16 * n), _mm256_castsi256_si128(bytes));
  }
  *factor = inverse(scale, top);
}

// Tokens from which decoding the weight once and multiplying in float is faster.
constexpr int64_t kManyExact = 3, kManyRounded = 8;

#include "byte_level.inc"

}  // namespace NOMUL_NAMESPACE

const nomul_kernels* nomul_avx2_kernels() {
  using namespace NOMUL_NAMESPACE;
  static const nomul_kernels k = {"avx2", {scratch_bytes, prepare, spare_bytes, rows}, kDense, hadamard, decode};
  return &k;
}
