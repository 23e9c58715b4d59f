// Random signs and a Hadamard transform as a Kronecker product of small matrices of +-1.
#pragma once

#include <cstdint>
#include <cstring>

namespace NOMUL_NAMESPACE {

// Add matrix x to y along the middle axis of [before, size, after]; matrix: columns of the factor, [size, size].
static void turn_axis(const float* x, const float* columns, int64_t before, int64_t size, int64_t after, float* y) {
  std::memset(y, 0, sizeof(float) * before * size * after);
  for (int64_t b = 0; b < before; b++, x += size * after, y += size * after)
    for (int64_t j = 0; j < size; j++) {
      const float* column = columns + j * size;
      if (after == 1) {
        const float value = x[j];
        for (int64_t i = 0; i < size; i++) y[i] += column[i] * value;
      } else {
        for (int64_t i = 0; i < size; i++) {
          const float factor = column[i];
          for (int64_t k = 0; k < after; k++) y[i * after + k] += factor * x[j * after + k];
        }
      }
    }
}

// y = H D x, or D H^T x where `signs_last`, for one token; spare: as many values as a token has.
static void hadamard(const float* x, const float* signs, int signs_last, int64_t width, int64_t factors,
                     const int64_t* sizes, const float* const* columns, float* y, float* spare) {
  float *from = y, *to = spare;
  if (factors % 2) from = spare, to = y;
  for (int64_t i = 0; i < width; i++) from[i] = signs_last ? x[i] : x[i] * signs[i];
  int64_t after = 1;
  for (int64_t f = factors - 1; f >= 0; f--) {
    turn_axis(from, columns[f], width / (sizes[f] * after), sizes[f], after, to);
    after *= sizes[f];
    float* swap = from;
    from = to, to = swap;
  }
  if (signs_last)
    for (int64_t i = 0; i < width; i++) y[i] *= signs[i];
}

}  // namespace NOMUL_NAMESPACE
