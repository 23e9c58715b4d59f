// Many tokens in float: 32 rows at a time are turned into columns once, then multiplied with all tokens.
#pragma once

#include "columns.h"
#include "kernels.h"

namespace NOMUL_NAMESPACE {

// Decode a tile to w [inputs][32 rows].
template <int P>
static void decode_columns(const Shape& s, const uint8_t* tile, float* w) {
  Reader<P> reader(s, tile);
  for (int64_t g = 0; g < s.groups; g++) {
    const int64_t end = g + 1 < s.groups ? (g + 1) * s.group : s.inputs;
    for (int64_t k = g * s.group; k < end; k += kChunk) {
      const int count = (int)(end - k < kChunk ? end - k : kChunk);
      reader.chunk([&](int half, const auto& value_of) {
        for (int i = 0; i < count; i++) store(w + (k + i) * kRows + half * kLanes, value_of(i), kLanes);
      });
    }
  }
}

// Activations as [kTokens at a time][input][token], filled up with zeros: tokens of a wide layer lie a multiple of a
// page apart, where they would drive each other out of the first cache.
static inline int64_t float_scratch_bytes(int64_t inputs, int64_t tokens) {
  return over(tokens, kTokens) * kTokens * inputs * (int64_t)sizeof(float);
}

static void pack_tokens(int64_t inputs, const float* x, int64_t tokens, float* out) {
  for (int64_t first = 0; first < tokens; first += kTokens)
    for (int64_t k = 0; k < inputs; k++, out += kTokens)
      for (int t = 0; t < kTokens; t++) out[t] = first + t < tokens ? x[(first + t) * inputs + k] : 0.0f;
}

// Inputs whose products are added up before they are added to the rest, so that rounding grows slowly.
constexpr int64_t kBlockInputs = 256;

// y [at most kTokens tokens, 32 rows] = x w + bias; `count` rows are stored.
static void few_tokens(const float* w, const float* x, int64_t inputs, const float* bias, int count, int64_t tokens,
                       int64_t rows, float* y) {
  Floats total[kTokens][kHalves];
  for (int t = 0; t < kTokens; t++)
    for (int h = 0; h < kHalves; h++)
      total[t][h] = bias && count > h * kLanes ? load_some(bias + h * kLanes, count - h * kLanes) : zeros();
  for (int64_t first = 0; first < inputs; first += kBlockInputs) {
    const int64_t last = first + kBlockInputs < inputs ? first + kBlockInputs : inputs;
    Floats sum[kTokens][kHalves];
#pragma GCC unroll 16
    for (int t = 0; t < kTokens; t++) sum[t][0] = sum[t][1] = zeros();
    for (int64_t k = first; k < last; k++) {
      const Floats a = load(w + k * kRows), b = load(w + k * kRows + kLanes);
#pragma GCC unroll 16
      for (int t = 0; t < kTokens; t++) {
        const Floats value = all(x[k * kTokens + t]);
        sum[t][0] = fma(value, a, sum[t][0]), sum[t][1] = fma(value, b, sum[t][1]);
      }
    }
#pragma GCC unroll 16
    for (int t = 0; t < kTokens; t++)
      total[t][0] = total[t][0] + sum[t][0], total[t][1] = total[t][1] + sum[t][1];
  }
  for (int t = 0; t < kTokens && t < tokens; t++) {
    store(y + t * rows, total[t][0], count < kLanes ? count : kLanes);
    if (count > kLanes) store(y + t * rows + kLanes, total[t][1], count - kLanes);
  }
}

static inline int64_t float_spare_bytes(int64_t inputs) { return inputs * kRows * (int64_t)sizeof(float); }

// columns(row, w): write 32 rows from `row` on as w [inputs][32].
template <class Form, class Columns>
static void float_rows(const nomul_job<Form>& job, float* spare, const Columns& columns) {
  const int64_t inputs = job.form.inputs, rows = job.form.rows;
  for (int64_t row = job.first_row; row < job.last_row; row += kRows) {
    columns(row, spare);
    const int count = (int)(job.last_row - row < kRows ? job.last_row - row : kRows);
    const float* bias = job.bias ? job.bias + row : nullptr;
    for (int64_t t = 0; t < job.tokens; t += kTokens)
      few_tokens(spare, (const float*)job.scratch + t * inputs, inputs, bias, count, job.tokens - t, rows,
                 job.y + t * rows + row);
  }
}

static void float_tiled_rows(const nomul_job<nomul_layout>& job, float* spare) {
  const Shape s = shape_of(job.form);
  float_rows(job, spare, [&](int64_t row, float* w) {
    with_planes(s, [&](auto planes) { decode_columns<planes.value>(s, job.weight + row / kRows * s.tile_bytes, w); });
  });
}

}  // namespace NOMUL_NAMESPACE
