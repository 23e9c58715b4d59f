// How a block of activations is rounded to whole numbers.
#pragma once

#include <cmath>
#include <limits>

namespace NOMUL_NAMESPACE {

// What a block is multiplied with so that its largest sum becomes `whole`, within the range of floats; zero for zeros.
static inline float scale_to(float whole, float top) {
  return top > 0.0f ? std::fmin(whole / top, 0.125f * std::numeric_limits<float>::max()) : 0.0f;
}

// What its whole numbers are multiplied with again: none is right where a sum is larger than any float.
static inline float inverse(float scale, float top) {
  if (top > std::numeric_limits<float>::max()) return std::numeric_limits<float>::quiet_NaN();
  return scale > 0.0f ? 1.0f / scale : 0.0f;
}

}  // namespace NOMUL_NAMESPACE
