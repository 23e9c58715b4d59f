// Random signs and a Hadamard transform as a Kronecker product of small matrices of +-1.
#pragma once

#include "layout.h"

namespace NOMUL_NAMESPACE {

// Sums that are taken side by side, so that none waits for the one before.
constexpr int kAside = 4;

// y[r * y_step] = sum_j weights[j * weight_step + r * weight_next] * x[j * x_step + r * x_next] for R results of `count`
// values each; Spread says which of the two is a single number for all values.
struct Steps {
  int64_t size, x_step, x_next, weight_step, weight_next, y_next;
};

template <int R, bool SpreadWeights>
static void sum_products(const float* x, const float* weights, const Steps& s, int count, float* y) {
  Floats sum[R];
#pragma GCC unroll 4
  for (int r = 0; r < R; r++) sum[r] = zeros();
  for (int64_t j = 0; j < s.size; j++, x += s.x_step, weights += s.weight_step) {
#pragma GCC unroll 4
    for (int r = 0; r < R; r++) {
      const Floats a = SpreadWeights ? all(weights[r * s.weight_next]) : all(x[r * s.x_next]);
      sum[r] = fma(a, load_some(SpreadWeights ? x : weights, count), sum[r]);
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; r++) store(y + r * s.y_next, sum[r], count);
}

template <bool SpreadWeights>
static void sums(const float* x, const float* weights, const Steps& s, int64_t results, int count, float* y) {
  int64_t r = 0;
  const auto from = [&](const float* p, int64_t next) { return p + r * next; };
  for (; r + kAside <= results; r += kAside)
    sum_products<kAside, SpreadWeights>(from(x, s.x_next), from(weights, s.weight_next), s, count, y + r * s.y_next);
  for (; r < results; r++)
    sum_products<1, SpreadWeights>(from(x, s.x_next), from(weights, s.weight_next), s, count, y + r * s.y_next);
}

static inline int lanes_left(int64_t size, int64_t first) { return (int)(size - first < kLanes ? size - first : kLanes); }

// Multiply the middle axis of x [before, size, after] by a factor given by columns, [size, size].
static void turn_axis(const float* x, const float* columns, int64_t before, int64_t size, int64_t after, float* y) {
  if (after == 1) {
    const Steps s = {size, 1, size, size, 0, size};
    for (int64_t i = 0; i < size; i += kLanes) sums<false>(x, columns + i, s, before, lanes_left(size, i), y + i);
    return;
  }
  const Steps s = {size, after, 0, size, 1, after};
  for (int64_t b = 0; b < before; b++, x += size * after, y += size * after)
    for (int64_t k = 0; k < after; k += kLanes) sums<true>(x + k, columns, s, size, lanes_left(after, k), y + k);
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
