// A tile decoded chunk by chunk: 32 rows side by side, one input after another.
#pragma once

#include "scales.h"

namespace NOMUL_NAMESPACE {

// Reads the chunks of a tile in their order.
template <int P>
struct Reader {
  const Shape& s;
  const uint8_t *head, *record, *signs;
  int64_t group = -1, left = 0;
  Floats low[kHalves], step[kHalves][P];

  Reader(const Shape& shape, const uint8_t* tile)
      : s(shape), head(tile), record(tile + kHalves * shape.exponent_bytes), signs(tile + shape.head_bytes) {}

  // The value of a weight is `low` and the steps of the planes that have its bit.
  void next_group() {
    const bool offset = s.offset != NOMUL_NO_OFFSET || s.tied;
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
    left = ++group + 1 < s.groups ? s.group_chunks : s.last_chunks;
  }

  // Call sink(half, value_of) for both halves of the next chunk; value_of(i) are the weights of 16 rows at its input i.
  template <class Sink>
  NOMUL_INLINE_MEMBER void chunk(const Sink& sink) {
    if (!left) next_group();
    left--;
    for (int h = 0; h < kHalves; h++) {
      Words bits[P];
      Floats base = low[h], up[P];
#pragma GCC unroll 8
      for (int p = 0; p < P; p++) bits[p] = words(signs + (p * kHalves + h) * 64), up[p] = step[h][p];
      sink(h, [&](int i) {
        Floats value = base;
#pragma GCC unroll 8
        for (int p = 0; p < P; p++) value = plus_where(value, bits[p], i, up[p]);
        return value;
      });
    }
    signs += P * kHalves * 64;
  }
};

}  // namespace NOMUL_NAMESPACE
