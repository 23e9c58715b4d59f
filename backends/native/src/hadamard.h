// Random signs and a Hadamard transform as a Kronecker product of small matrices of +-1.
#pragma once

#include "layout.h"

namespace NOMUL_NAMESPACE {

// Return sum_j factors[j * step] * x[j * stride ...], `count` values of it.
NOMUL_INLINE Floats weighted_sum(const float* x, const float* factors, int64_t size, int64_t stride, int64_t step,
                                 int count) {
  Floats sum = zeros();
  if (count >= kLanes)
    for (int64_t j = 0; j < size; j++) sum = fma(all(factors[j * step]), load(x + j * stride), sum);
  else
    for (int64_t j = 0; j < size; j++) sum = fma(all(factors[j * step]), load_some(x + j * stride, count), sum);
  return sum;
}

// Multiply the middle axis of x [before, size, after] by a factor given by columns, [size, size].
static void turn_axis(const float* x, const float* columns, int64_t before, int64_t size, int64_t after, float* y) {
  for (int64_t b = 0; b < before; b++, x += size * after, y += size * after)
    if (after == 1) {
      for (int64_t i = 0; i < size; i += kLanes) {
        const int count = (int)(size - i < kLanes ? size - i : kLanes);
        store(y + i, weighted_sum(columns + i, x, size, size, 1, count), count);
      }
    } else {
      for (int64_t k = 0; k < after; k += kLanes) {
        const int count = (int)(after - k < kLanes ? after - k : kLanes);
        for (int64_t i = 0; i < size; i++)
          store(y + i * after + k, weighted_sum(x + k, columns + i, size, after, size, count), count);
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
