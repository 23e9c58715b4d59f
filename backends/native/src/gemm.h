// Many tokens: 32 rows at a time are decoded to float once, then multiplied with all tokens.
#pragma once

#include "scales.h"

namespace NOMUL_NAMESPACE {

// Decode a tile to w [inputs][32 rows].
template <int P>
static void decode_columns(const Shape& s, const uint8_t* head, float* w) {
  const uint8_t* record = head + kHalves * s.exponent_bytes;
  const uint8_t* signs = head + s.head_bytes;
  const bool offset = s.offset != NOMUL_NO_OFFSET || s.tied;
  for (int64_t g = 0; g < s.groups; g++) {
    Floats low[kHalves], step[kHalves][P];
    for (int h = 0; h < kHalves; h++, record += s.scale_bytes) {
      const int8_t* exponents = (const int8_t*)head + h * s.exponent_bytes;
      Scales<P> scales;
      decode_scales<P>(s, record, scales);
      low[h] = offset ? scales.offset : zeros();
      if (offset && s.terms) low[h] = scaled(low[h], s.tied ? exponents : exponents + kLanes);
      for (int p = 0; p < P; p++) {
        const Floats alpha = s.terms ? scaled(scales.plane[p], exponents) : scales.plane[p];
        low[h] = fma(alpha, all(-1.0f), low[h]), step[h][p] = alpha + alpha;
      }
    }
    const int64_t start = g * s.group, end = g + 1 < s.groups ? start + s.group : s.inputs;
    for (int64_t k = start; k < end; k += kChunk, signs += P * kHalves * 64) {
      const int count = (int)(end - k < kChunk ? end - k : kChunk);
      for (int h = 0; h < kHalves; h++) {
        Words bits[P];
        for (int p = 0; p < P; p++) bits[p] = words(signs + (p * kHalves + h) * 64);
        for (int i = 0; i < count; i++) {
          Floats value = low[h];
          for (int p = 0; p < P; p++) value = plus_where(value, bits[p], i, step[h][p]);
          store(w + (k + i) * kRows + h * kLanes, value, kLanes);
        }
      }
    }
  }
}

static inline void decode_tile(const Shape& s, const uint8_t* head, float* w) {
  switch (s.planes) {
    case 1: return decode_columns<1>(s, head, w);
    case 2: return decode_columns<2>(s, head, w);
    case 3: return decode_columns<3>(s, head, w);
    case 4: return decode_columns<4>(s, head, w);
    case 5: return decode_columns<5>(s, head, w);
    case 6: return decode_columns<6>(s, head, w);
    case 7: return decode_columns<7>(s, head, w);
    case 8: return decode_columns<8>(s, head, w);
  }
}

// y [T tokens, 32 rows] = x w + bias; `count` rows are stored.
template <int T>
static void few_tokens(const float* w, const float* x, int64_t inputs, const float* bias, int count, int64_t rows,
                       float* y) {
  Floats sum[T][kHalves];
#pragma GCC unroll 16
  for (int t = 0; t < T; t++)
#pragma GCC unroll 2
    for (int h = 0; h < kHalves; h++)
      sum[t][h] = bias && count > h * kLanes ? load_some(bias + h * kLanes, count - h * kLanes) : zeros();
  for (int64_t k = 0; k < inputs; k++) {
    const Floats a = load(w + k * kRows), b = load(w + k * kRows + kLanes);
#pragma GCC unroll 16
    for (int t = 0; t < T; t++) {
      const Floats value = all(x[t * inputs + k]);
      sum[t][0] = fma(value, a, sum[t][0]), sum[t][1] = fma(value, b, sum[t][1]);
    }
  }
#pragma GCC unroll 16
  for (int t = 0; t < T; t++) {
    store(y + t * rows, sum[t][0], count < kLanes ? count : kLanes);
    if (count > kLanes) store(y + t * rows + kLanes, sum[t][1], count - kLanes);
  }
}

// spare: float [inputs * 32].
static void many_rows(const nomul_layout& l, const uint8_t* weight, const float* bias, const float* x, int64_t tokens,
                      int64_t first_row, int64_t last_row, float* y, float* spare) {
  const Shape s = shape_of(l);
  for (int64_t row = first_row; row < last_row; row += kRows) {
    decode_tile(s, weight + row / kRows * s.tile_bytes, spare);
    const int count = (int)(last_row - row < kRows ? last_row - row : kRows);
    const float* its_bias = bias ? bias + row : nullptr;
    int64_t t = 0;
    for (; t + kTokens <= tokens; t += kTokens)
      few_tokens<kTokens>(spare, x + t * s.inputs, s.inputs, its_bias, count, s.rows, y + t * s.rows + row);
    for (; t < tokens; t++)
      few_tokens<1>(spare, x + t * s.inputs, s.inputs, its_bias, count, s.rows, y + t * s.rows + row);
  }
}

}  // namespace NOMUL_NAMESPACE
