// Sixteen rows at a time in plain C++.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

// Without registers to keep values in, forcing functions into their callers only makes compiling slow.
#define NOMUL_INLINE static inline
#define NOMUL_INLINE_MEMBER inline __attribute__((always_inline))

namespace NOMUL_NAMESPACE {

struct Floats {
  float v[16];
};
struct Ints {
  int32_t v[16];
};

static inline Floats all(float x) {
  Floats r;
  for (float& e : r.v) e = x;
  return r;
}
static inline Floats zeros() { return all(0.0f); }
static inline Floats load_some(const float* p, int count) {
  Floats r = zeros();
  std::memcpy(r.v, p, sizeof(float) * (count < 16 ? count : 16));
  return r;
}
static inline Floats load(const float* p) { return load_some(p, 16); }
static inline float half(uint16_t h) {
  const int exponent = h >> 10 & 31, fraction = h & 1023;
  const float sign = h >> 15 ? -1.0f : 1.0f;
  if (exponent == 0) return sign * std::ldexp((float)fraction, -24);
  if (exponent == 31) return fraction ? NAN : sign * INFINITY;
  return sign * std::ldexp((float)(fraction + 1024), exponent - 25);
}
static inline Floats load_half(const uint8_t* p) {
  Floats r;
  for (int i = 0; i < 16; i++) r.v[i] = half((uint16_t)(p[2 * i] | p[2 * i + 1] << 8));
  return r;
}
static inline Floats load_bfloat(const uint8_t* p) {
  Floats r;
  for (int i = 0; i < 16; i++) {
    const uint32_t bits = (uint32_t)(p[2 * i] | p[2 * i + 1] << 8) << 16;
    std::memcpy(&r.v[i], &bits, 4);
  }
  return r;
}
static inline Floats load_int8(const uint8_t* p) {
  Floats r;
  for (int i = 0; i < 16; i++) r.v[i] = (int8_t)p[i];
  return r;
}
static inline float one_half(const uint8_t* p) { return half((uint16_t)(p[0] | p[1] << 8)); }
static inline float sum_of(Floats x) {
  for (int step = 8; step; step /= 2)
    for (int i = 0; i < step; i++) x.v[i] += x.v[i + step];
  return x.v[0];
}
static inline Floats operator+(Floats a, Floats b) {
  for (int i = 0; i < 16; i++) a.v[i] += b.v[i];
  return a;
}
static inline Floats operator*(Floats a, Floats b) {
  for (int i = 0; i < 16; i++) a.v[i] *= b.v[i];
  return a;
}
static inline Floats fma(Floats a, Floats b, Floats c) { return a * b + c; }
static inline void store(float* p, Floats a, int count) { std::memcpy(p, a.v, sizeof(float) * (count < 16 ? count : 16)); }

static inline void prefetch(const void* p) { __builtin_prefetch(p); }

static inline Ints bytes(const uint8_t* p) {
  Ints r;
  for (int i = 0; i < 16; i++) r.v[i] = p[i];
  return r;
}
static inline Ints low_nibbles(Ints a) {
  for (int32_t& e : a.v) e &= 15;
  return a;
}
static inline Ints high_nibbles(Ints a) {
  for (int32_t& e : a.v) e >>= 4;
  return a;
}
static inline Floats to_float(Ints a) {
  Floats r;
  for (int i = 0; i < 16; i++) r.v[i] = (float)a.v[i];
  return r;
}
static inline Floats pick(const float* table16, Ints index) {
  Floats r;
  for (int i = 0; i < 16; i++) r.v[i] = table16[index.v[i]];
  return r;
}
// x * 2^exponents.
static inline Floats scaled(Floats x, const int8_t* exponents) {
  for (int i = 0; i < 16; i++) x.v[i] = std::ldexp(x.v[i], exponents[i]);
  return x;
}

// Signs of 16 rows at 32 inputs.
struct Words {
  uint32_t v[16];
};
static inline Words words(const uint8_t* p) {
  Words r;
  std::memcpy(r.v, p, sizeof r.v);
  return r;
}
// x plus `step` in the rows that have a bit at input i.
static inline Floats plus_where(Floats x, Words bits, int i, Floats step) {
  for (int r = 0; r < 16; r++) x.v[r] += bits.v[r] >> i & 1 ? step.v[r] : 0.0f;
  return x;
}

// Tokens that are multiplied at once.
constexpr int kTokens = 2;

}  // namespace NOMUL_NAMESPACE
