// Weights of 16-bit floats or int8, row after row, read as floats.
#pragma once

#include <cstring>

#include "layout.h"

namespace NOMUL_NAMESPACE {

template <int Kind>
constexpr int64_t kBytes = Kind == NOMUL_INT8 ? 1 : 2;

template <int Kind>
static inline Floats load_wide(const uint8_t* p) {
  if constexpr (Kind == NOMUL_INT8) return load_int8(p);
  else if constexpr (Kind == NOMUL_FLOAT16) return load_half(p);
  else return load_bfloat(p);
}

// `count` weights of a row from input k on, a multiple of 16, as floats; the others are zero.
template <int Kind>
NOMUL_INLINE Floats weights_at(const nomul_dense& d, const uint8_t* weight, int64_t row, int64_t k, int count) {
  const uint8_t* from = weight + (row * d.inputs + k) * kBytes<Kind>;
  Floats found;
  if (count == kLanes) {
    found = load_wide<Kind>(from);
  } else {
    alignas(64) uint8_t whole[2 * kLanes] = {};
    std::memcpy(whole, from, kBytes<Kind> * count);
    found = load_wide<Kind>(whole);
  }
  if constexpr (Kind == NOMUL_INT8) {
    const uint8_t* scale = (const uint8_t*)d.scales + (row * over(d.inputs, NOMUL_BLOCK) + k / NOMUL_BLOCK) * 2;
    found = found * all(one_half(scale));
  }
  return found;
}

}  // namespace NOMUL_NAMESPACE
