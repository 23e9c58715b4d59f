// AVX-512 F/BW/VL with VBMI and VNNI: 64 look-ups an instruction in tables of bytes, or 16 in tables of floats.
#define NOMUL_NAMESPACE nomul_avx512
#include <cmath>

#include "kernels.h"
#include "lanes_avx512.h"
#include "gemm.h"
#include "hadamard.h"
#include "rows.h"

namespace NOMUL_NAMESPACE {

// Bytes ahead of a read that are asked for: what one core's stream from memory needs to run on.
constexpr int kAhead = 4096;

struct FloatSums {
  static constexpr int64_t kTableBytes = kFloatTableBytes;

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

// All sums of four numbers with signs: lane c takes +x[b] where c has bit b, -x[b] elsewhere.
static inline __m512i four_sums(const int32_t* x) {
  __m512i t = _mm512_sub_epi32(_mm512_setzero_si512(), _mm512_set1_epi32(x[0] + x[1] + x[2] + x[3]));
  t = _mm512_mask_add_epi32(t, 0xAAAA, t, _mm512_set1_epi32(2 * x[0]));
  t = _mm512_mask_add_epi32(t, 0xCCCC, t, _mm512_set1_epi32(2 * x[1]));
  t = _mm512_mask_add_epi32(t, 0xF0F0, t, _mm512_set1_epi32(2 * x[2]));
  return _mm512_mask_add_epi32(t, 0xFF00, t, _mm512_set1_epi32(2 * x[3]));
}

// Nibble n of a chunk is half n & 1 of byte n >> 1.
static inline int64_t place_of(int n) { return (n & 1) * 64 + (n >> 1) * 16; }

static inline float largest(const float* x, int count) {
  __m512 top = _mm512_setzero_ps();
  for (int i = 0; i < count; i += 16) top = _mm512_max_ps(top, _mm512_abs_ps(_mm512_load_ps(x + i)));
  return _mm512_reduce_max_ps(top);
}

// Round a block to whole numbers of at most 13 bits and a sign; a block of zeros has the factor zero.
static void two_byte_tables(const float* x, int chunks, uint8_t* tables, float* factor) {
  const float top = largest(x, chunks * kChunk);
  const __m512 scale = _mm512_set1_ps(top > 0.0f ? 8191.0f / top : 0.0f);
  alignas(64) int32_t whole[kBlockChunks * kChunk];
  for (int i = 0; i < chunks * kChunk; i += 16)
    _mm512_store_si512(whole + i, _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_load_ps(x + i), scale)));
  for (int c = 0; c < chunks; c++, tables += 256)
    for (int n = 0; n < 8; n++) {
      const __m512i sums = four_sums(whole + c * kChunk + 4 * n);
      _mm_store_si128((__m128i*)(tables + place_of(n)), _mm512_cvtepi32_epi8(_mm512_srai_epi32(sums, 8)));
      _mm_store_si128((__m128i*)(tables + 128 + place_of(n)), _mm512_cvtepi32_epi8(sums));
    }
  *factor = top / 8191.0f;
}

// Round the sums of a block to 8 bits: 127 stands for the largest of them.
static void byte_tables(const float* x, int chunks, uint8_t* tables, float* factor) {
  float top = 0.0f;
  for (int i = 0; i < chunks * kChunk; i += 4) {
    const float sum = std::fabs(x[i]) + std::fabs(x[i + 1]) + std::fabs(x[i + 2]) + std::fabs(x[i + 3]);
    top = sum > top ? sum : top;
  }
  const __m512 scale = _mm512_set1_ps(top > 0.0f ? 127.0f / top : 0.0f);
  for (int c = 0; c < chunks; c++, tables += 128)
    for (int n = 0; n < 8; n++) {
      alignas(64) float sums[16];
      four_sums(x + c * kChunk + 4 * n, sums);
      const __m512i rounded = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_load_ps(sums), scale));
      _mm_store_si128((__m128i*)(tables + place_of(n)), _mm512_cvtepi32_epi8(rounded));
    }
  *factor = top / 127.0f;
}

static int64_t table_bytes(int32_t mode) {
  return mode == NOMUL_EXACT ? FloatSums::kTableBytes : mode == NOMUL_8_BIT ? 128 : 256;
}

static int64_t scratch_bytes(const nomul_layout& l, int64_t tokens, int32_t mode) {
  return scratch_of(shape_of(l), table_bytes(mode)).token_bytes * tokens;
}

static void prepare(const nomul_layout& l, int32_t mode, const float* x, int64_t tokens, void* scratch) {
  const Shape s = shape_of(l);
  const Scratch at = scratch_of(s, table_bytes(mode));
  const auto make = mode == NOMUL_EXACT ? float_tables : mode == NOMUL_8_BIT ? byte_tables : two_byte_tables;
  for (int64_t t = 0; t < tokens; t++)
    each_block(s, at, x + t * s.inputs, (uint8_t*)scratch + t * at.token_bytes, make);
}

static void rows(const nomul_layout& l, int32_t mode, const uint8_t* weight, const float* bias, const void* scratch,
                 int64_t tokens, int64_t first_row, int64_t last_row, float* y) {
  const Shape s = shape_of(l);
  const Scratch at = scratch_of(s, table_bytes(mode));
  const Run run = {s, at, weight, bias, scratch, tokens, last_row, y};
  if (mode == NOMUL_EXACT) rows_with<FloatSums>(run, first_row);
  else if (mode == NOMUL_8_BIT) rows_with<ByteSums<false>>(run, first_row);
  else rows_with<ByteSums<true>>(run, first_row);
}

static void decode(const nomul_layout& l, const uint8_t* weight, int64_t first_row, int64_t last_row, float* out) {
  decode_rows(shape_of(l), weight, first_row, last_row, out);
}

}  // namespace NOMUL_NAMESPACE

const nomul_kernels* nomul_avx512_kernels() {
  using namespace NOMUL_NAMESPACE;
  static const nomul_kernels k = {"avx512", scratch_bytes, prepare, rows, many_rows, hadamard, decode};
  return &k;
}
