// Any CPU: float tables, looked up one by one.
#define NOMUL_NAMESPACE nomul_portable
#include "kernels.h"
#include "lanes_portable.h"
#include "dense.h"
#include "hadamard.h"
#include "rows.h"

namespace NOMUL_NAMESPACE {

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
            for (int row = 0; row < kLanes; row++) {
              uint32_t bits;
              std::memcpy(&bits, signs + ((c * P + p) * kHalves + r) * 64 + row * 4, 4);
              float sum = 0.0f;
              for (int n = 0; n < 8; n++) sum += t[16 * n + (bits >> 4 * n & 15)];
              total.v[row] += sum;
            }
          }
          sums[r][m][p] = total;
        }
  }
};

// Tokens from which decoding the weight once is faster.
constexpr int64_t kMany = 9;

#include "float_level.inc"

}  // namespace NOMUL_NAMESPACE

const nomul_kernels* nomul_portable_kernels() {
  using namespace NOMUL_NAMESPACE;
  static const nomul_kernels k = {"portable", {scratch_bytes, prepare, spare_bytes, rows}, kDense, hadamard, decode};
  return &k;
}
