// AVX-512 F/BW/VL with VBMI and VNNI: 64 look-ups an instruction in tables of bytes, or 16 in tables of floats.
#define NOMUL_NAMESPACE nomul_avx512
#include "kernels.h"
#include "lanes_avx512.h"
#include "dense.h"
#include "hadamard.h"
#include "rounding.h"
#include "rows.h"

namespace NOMUL_NAMESPACE {

// Bytes ahead of a read that are asked for: what one core's stream from memory needs to run on.
constexpr int kAhead = 4096;

struct FloatSums {
  static constexpr int64_t kTableBytes = kFloatTableBytes;
  static constexpr bool kWholeTiles = false;

  template <int P, int R, int M>
  NOMUL_INLINE void block(const uint8_t* signs, int chunks, const Token* tokens, Floats (*sums)[M][P]) {
    for (int r = 0; r < R; r++)
      for (int m = 0; m < M; m++)
        for (int p = 0; p < P; p++) {
          __m512 total = sums[r][m][p].v;
          for (int c = 0; c < chunks; c++) {
            const uint8_t* from = signs + ((c * P + p) * kHalves + r) * 64;
            const float* t = (const float*)(tokens[m].tables + c * kTableBytes);
            _mm_prefetch((const char*)from + kAhead, _MM_HINT_T0);
            const __m512i v = _mm512_loadu_si512(from);
            __m512 a = pick_at<0>(v, t), b = pick_at<1>(v, t);
            a = _mm512_add_ps(a, pick_at<2>(v, t)), b = _mm512_add_ps(b, pick_at<3>(v, t));
            a = _mm512_add_ps(a, pick_at<4>(v, t)), b = _mm512_add_ps(b, pick_at<5>(v, t));
            a = _mm512_add_ps(a, pick_at<6>(v, t)), b = _mm512_add_ps(b, pick_at<7>(v, t));
            total = _mm512_add_ps(total, _mm512_add_ps(a, b));
          }
          sums[r][m][p].v = total;
        }
  }

  template <int N>
  static inline __m512 pick_at(__m512i v, const float* t) {
    return _mm512_permutexvar_ps(N ? _mm512_srli_epi32(v, 4 * N) : v, _mm512_load_ps(t + 16 * N));
  }
};

// Tables of whole numbers in bytes: two of 64 entries a chunk, for the low and the high nibbles of the four bytes of a
// row's signs. Two: the high bytes of 16-bit sums, then the low bytes, so that activations keep 14 bits.
template <bool Two>
struct ByteSums {
  static constexpr int64_t kTableBytes = Two ? 256 : 128;
  static constexpr bool kWholeTiles = false;

  template <int P, int R, int M>
  NOMUL_INLINE void block(const uint8_t* signs, int chunks, const Token* tokens, Floats (*sums)[M][P]) {
    const __m512i nibble = _mm512_set1_epi8(15), place = _mm512_set1_epi32(0x30201000), one = _mm512_set1_epi8(1);
    __m512i high[R][M][P], low[R][M][P];
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
#pragma GCC unroll 4
      for (int m = 0; m < M; m++)
#pragma GCC unroll 8
        for (int p = 0; p < P; p++) high[r][m][p] = low[r][m][p] = _mm512_setzero_si512();
#pragma GCC unroll 1
    for (int c = 0; c < chunks; c++) {
#pragma GCC unroll 8
      for (int r = 0; r < R; r++)
#pragma GCC unroll 8
        for (int p = 0; p < P; p++) {
          const uint8_t* from = signs + ((c * P + p) * kHalves + r) * 64;
          _mm_prefetch((const char*)from + kAhead, _MM_HINT_T0);
          const __m512i v = _mm512_loadu_si512(from);
          const __m512i even = _mm512_ternarylogic_epi32(v, nibble, place, 0xEA);
          const __m512i odd = _mm512_ternarylogic_epi32(_mm512_srli_epi32(v, 4), nibble, place, 0xEA);
#pragma GCC unroll 4
          for (int m = 0; m < M; m++) {
            const uint8_t* t = tokens[m].tables + c * kTableBytes;
            __m512i& h = high[r][m][p];
            h = _mm512_dpbusd_epi32(h, one, _mm512_permutexvar_epi8(even, _mm512_load_si512(t)));
            h = _mm512_dpbusd_epi32(h, one, _mm512_permutexvar_epi8(odd, _mm512_load_si512(t + 64)));
            if constexpr (Two) {
              __m512i& l = low[r][m][p];
              l = _mm512_dpbusd_epi32(l, _mm512_permutexvar_epi8(even, _mm512_load_si512(t + 128)), one);
              l = _mm512_dpbusd_epi32(l, _mm512_permutexvar_epi8(odd, _mm512_load_si512(t + 192)), one);
            }
          }
        }
    }
#pragma GCC unroll 4
    for (int m = 0; m < M; m++) {
      const __m512 factor = _mm512_set1_ps(*tokens[m].factors);
#pragma GCC unroll 8
      for (int r = 0; r < R; r++)
#pragma GCC unroll 8
        for (int p = 0; p < P; p++) {
          __m512i whole = high[r][m][p];
          if constexpr (Two) whole = _mm512_add_epi32(_mm512_slli_epi32(whole, 8), low[r][m][p]);
          const __m512 sum = _mm512_cvtepi32_ps(whole);
          sums[r][m][p].v = _mm512_fmadd_ps(sum, factor, sums[r][m][p].v);
        }
    }
  }
};

// All sums of four numbers with signs: lane c takes +x[b] where c has bit b, -x[b] elsewhere; times scale.
struct FourSums {
  __m512 sign[4];
  explicit FourSums(float scale) {
    const __m512 up = _mm512_set1_ps(scale), down = _mm512_set1_ps(-scale);
    const __mmask16 has[4] = {0xAAAA, 0xCCCC, 0xF0F0, 0xFF00};
    for (int b = 0; b < 4; b++) sign[b] = _mm512_mask_blend_ps(has[b], down, up);
  }
  __m512 operator()(const float* x) const {
    const __m512 a = _mm512_mul_ps(_mm512_set1_ps(x[0]), sign[0]), b = _mm512_mul_ps(_mm512_set1_ps(x[2]), sign[2]);
    return _mm512_add_ps(_mm512_fmadd_ps(_mm512_set1_ps(x[1]), sign[1], a),
                         _mm512_fmadd_ps(_mm512_set1_ps(x[3]), sign[3], b));
  }
};

// The greatest of these sums in a block.
static inline float largest(const float* x, int chunks) {
  __m512 top = _mm512_setzero_ps();
  for (int i = 0; i < chunks * kChunk; i += 16) {
    const __m512 size = _mm512_abs_ps(_mm512_load_ps(x + i));
    const __m512 pair = _mm512_add_ps(size, _mm512_permute_ps(size, 0xB1));
    top = _mm512_max_ps(top, _mm512_add_ps(pair, _mm512_permute_ps(pair, 0x4E)));
  }
  return _mm512_reduce_max_ps(top);
}

static void exact_tables(const float* x, int chunks, uint8_t* tables, float* factor) {
  const FourSums sums(1.0f);
  for (int n = 0; n < chunks * kChunk / 4; n++) _mm512_store_ps((float*)tables + 16 * n, sums(x + 4 * n));
  *factor = 1.0f;
}

// Sums of nibbles n, n + 2, n + 4, n + 6 of a chunk as int16, entries 0..15 of each in the order that packing leaves.
static inline void whole_sums(const FourSums& sums, const float* x, __m512i* first, __m512i* second) {
  const __m512i a = _mm512_cvtps_epi32(sums(x)), b = _mm512_cvtps_epi32(sums(x + 8));
  const __m512i c = _mm512_cvtps_epi32(sums(x + 16)), d = _mm512_cvtps_epi32(sums(x + 24));
  *first = _mm512_packs_epi32(a, b), *second = _mm512_packs_epi32(c, d);
}

// Places of the bytes of two packed nibbles: packing takes turns, four entries of each at a time.
struct Places {
  alignas(64) uint8_t low[64], high[64];
};

constexpr Places make_places() {
  Places t{};
  for (int i = 0; i < 64; i++) {
    const int nibble = i / 16 % 2, entry = i % 16;
    const int word = entry / 4 * 8 + nibble * 4 + entry % 4;
    t.low[i] = (uint8_t)(2 * word), t.high[i] = (uint8_t)(2 * word + 1);
  }
  return t;
}

static constexpr Places kPlaces = make_places();

// One byte of each entry of two pairs of packed nibbles, 64 in all.
static inline __m512i bytes_of(__m512i first, __m512i second, const uint8_t* places) {
  const __m512i index = _mm512_load_si512(places);
  return _mm512_mask_permutexvar_epi8(_mm512_permutexvar_epi8(index, first), 0xFFFFFFFF00000000, index, second);
}

// Round the sums of a block to 16 bits: 32766 stands for the largest of them.
static void two_byte_tables(const float* x, int chunks, uint8_t* tables, float* factor) {
  const float top = largest(x, chunks);
  const float scale = scale_to(32766.0f, top);
  const FourSums sums(scale);
  for (int c = 0; c < chunks; c++, tables += 256)
    for (int odd = 0; odd < 2; odd++) {
      __m512i first, second;
      whole_sums(sums, x + c * kChunk + 4 * odd, &first, &second);
      _mm512_store_si512(tables + 64 * odd, bytes_of(first, second, kPlaces.high));
      _mm512_store_si512(tables + 128 + 64 * odd, bytes_of(first, second, kPlaces.low));
    }
  *factor = inverse(scale, top);
}

// The same to 8 bits: 127 stands for the largest sum.
static void byte_tables(const float* x, int chunks, uint8_t* tables, float* factor) {
  const float top = largest(x, chunks);
  const float scale = scale_to(127.0f, top);
  const FourSums sums(scale);
  for (int c = 0; c < chunks; c++, tables += 128)
    for (int odd = 0; odd < 2; odd++) {
      __m512i first, second;
      whole_sums(sums, x + c * kChunk + 4 * odd, &first, &second);
      _mm512_store_si512(tables + 64 * odd, bytes_of(first, second, kPlaces.low));
    }
  *factor = inverse(scale, top);
}

// Tokens from which decoding the weight once and multiplying in float is faster.
constexpr int64_t kManyExact = 9, kManyRounded = 64;

#include "byte_level.inc"

}  // namespace NOMUL_NAMESPACE

const nomul_kernels* nomul_avx512_kernels() {
  using namespace NOMUL_NAMESPACE;
  static const nomul_kernels k = {"avx512", {scratch_bytes, prepare, spare_bytes, rows}, kDense, hadamard, decode};
  return &k;
}
