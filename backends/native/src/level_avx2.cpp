// AVX2, FMA, F16C: eight float sums a register. Of the sixteen sums of a nibble eight are the others' negatives.
#define NOMUL_NAMESPACE nomul_avx2
#include "kernels.h"
#include "lanes_avx2.h"
#include "dense.h"
#include "hadamard.h"
#include "rows.h"

namespace NOMUL_NAMESPACE {

// The sums that eight rows select with nibble N of their signs; table: the sums whose fourth input is subtracted.
template <int N>
static inline __m256 selected(__m256i bits, __m256 table) {
  const __m256i flip = _mm256_srai_epi32(_mm256_slli_epi32(bits, 28 - 4 * N), 31);
  const __m256i index = _mm256_xor_si256(N ? _mm256_srli_epi32(bits, 4 * N) : bits, flip);
  const __m256 sign = _mm256_castsi256_ps(_mm256_slli_epi32(flip, 31));
  return _mm256_xor_ps(_mm256_permutevar8x32_ps(table, index), sign);
}

static inline __m256 chunk_sum(__m256i bits, const float* t) {
  __m256 a = selected<0>(bits, _mm256_loadu_ps(t)), b = selected<1>(bits, _mm256_loadu_ps(t + 16));
  a = _mm256_add_ps(a, selected<2>(bits, _mm256_loadu_ps(t + 32)));
  b = _mm256_add_ps(b, selected<3>(bits, _mm256_loadu_ps(t + 48)));
  a = _mm256_add_ps(a, selected<4>(bits, _mm256_loadu_ps(t + 64)));
  b = _mm256_add_ps(b, selected<5>(bits, _mm256_loadu_ps(t + 80)));
  a = _mm256_add_ps(a, selected<6>(bits, _mm256_loadu_ps(t + 96)));
  b = _mm256_add_ps(b, selected<7>(bits, _mm256_loadu_ps(t + 112)));
  return _mm256_add_ps(a, b);
}

struct FloatSums {
  static constexpr int64_t kTableBytes = kFloatTableBytes;

  template <int P, int R, int M>
  NOMUL_INLINE void block(const uint8_t* signs, int chunks, const Token* tokens, Floats (*sums)[M][P]) {
    for (int r = 0; r < R; r++)
      for (int m = 0; m < M; m++)
        for (int p = 0; p < P; p++) {
          Floats total = sums[r][m][p];
          for (int c = 0; c < chunks; c++) {
            const float* t = (const float*)(tokens[m].tables + c * kTableBytes);
            const __m256i* bits = (const __m256i*)(signs + ((c * P + p) * kHalves + r) * 64);
            total.a = _mm256_add_ps(total.a, chunk_sum(_mm256_loadu_si256(bits), t));
            total.b = _mm256_add_ps(total.b, chunk_sum(_mm256_loadu_si256(bits + 1), t));
          }
          sums[r][m][p] = total;
        }
  }
};

// Tokens from which decoding the weight once is faster.
constexpr int64_t kMany = 6;

#include "float_level.inc"

}  // namespace NOMUL_NAMESPACE

const nomul_kernels* nomul_avx2_kernels() {
  using namespace NOMUL_NAMESPACE;
  static const nomul_kernels k = {"avx2", {scratch_bytes, prepare, spare_bytes, rows}, kDense, hadamard, decode};
  return &k;
}
