// Sixteen rows at a time with AVX-512.
#pragma once

#include <immintrin.h>

#include <cstdint>

#define NOMUL_INLINE static inline __attribute__((always_inline))
#define NOMUL_INLINE_MEMBER inline __attribute__((always_inline))

namespace NOMUL_NAMESPACE {

struct Floats {
  __m512 v;
};
struct Ints {
  __m512i v;
};

static inline Floats zeros() { return {_mm512_setzero_ps()}; }
static inline Floats all(float x) { return {_mm512_set1_ps(x)}; }
static inline Floats load(const float* p) { return {_mm512_loadu_ps(p)}; }
static inline Floats load_half(const uint8_t* p) { return {_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p))}; }
static inline Floats load_bfloat(const uint8_t* p) {
  const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(wide, 16))};
}
static inline Floats load_int8(const uint8_t* p) {
  return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)))};
}
static inline float one_half(const uint8_t* p) { return _cvtsh_ss((unsigned short)(p[0] | p[1] << 8)); }
static inline float sum_of(Floats x) { return _mm512_reduce_add_ps(x.v); }
static inline Floats operator+(Floats a, Floats b) { return {_mm512_add_ps(a.v, b.v)}; }
static inline Floats operator*(Floats a, Floats b) { return {_mm512_mul_ps(a.v, b.v)}; }
static inline Floats fma(Floats a, Floats b, Floats c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
static inline void store(float* p, Floats a, int count) {
  if (count >= 16) _mm512_storeu_ps(p, a.v);
  else _mm512_mask_storeu_ps(p, (__mmask16)((1u << count) - 1), a.v);
}
static inline Floats load_some(const float* p, int count) {
  return count >= 16 ? load(p) : Floats{_mm512_maskz_loadu_ps((__mmask16)((1u << count) - 1), p)};
}

static inline void prefetch(const void* p) { _mm_prefetch((const char*)p, _MM_HINT_T0); }

static inline Ints bytes(const uint8_t* p) { return {_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p))}; }
static inline Ints low_nibbles(Ints a) { return {_mm512_and_si512(a.v, _mm512_set1_epi32(15))}; }
static inline Ints high_nibbles(Ints a) { return {_mm512_srli_epi32(a.v, 4)}; }
static inline Floats to_float(Ints a) { return {_mm512_cvtepi32_ps(a.v)}; }
static inline Floats pick(const float* table16, Ints index) {
  return {_mm512_permutexvar_ps(index.v, _mm512_loadu_ps(table16))};
}
// x * 2^exponents.
static inline Floats scaled(Floats x, const int8_t* exponents) {
  return {_mm512_scalef_ps(x.v, _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)exponents))))};
}

// Signs of 16 rows at 32 inputs.
struct Words {
  __m512i v;
};
static inline Words words(const uint8_t* p) { return {_mm512_loadu_si512(p)}; }
// x plus `step` in the rows that have a bit at input i.
static inline Floats plus_where(Floats x, Words bits, int i, Floats step) {
  return {_mm512_mask_add_ps(x.v, _mm512_test_epi32_mask(bits.v, _mm512_set1_epi32((int)(1u << i))), x.v, step.v)};
}

// Tokens that are multiplied at once: their sums fill the registers.
constexpr int kTokens = 12;

}  // namespace NOMUL_NAMESPACE
