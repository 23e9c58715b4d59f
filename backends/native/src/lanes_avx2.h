// Sixteen rows at a time with AVX2, FMA and F16C, as two halves.
#pragma once

#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstring>

#define NOMUL_INLINE static inline __attribute__((always_inline))
#define NOMUL_INLINE_MEMBER inline __attribute__((always_inline))

namespace NOMUL_NAMESPACE {

struct Floats {
  __m256 a, b;
};
struct Ints {
  __m256i a, b;
};

static inline Floats all(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
static inline Floats zeros() { return all(0.0f); }
static inline Floats load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
static inline Floats load_half(const uint8_t* p) {
  return {_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)), _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(p + 16)))};
}
static inline __m256 wide_bfloat(const uint8_t* p) {
  const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
}
static inline Floats load_bfloat(const uint8_t* p) { return {wide_bfloat(p), wide_bfloat(p + 16)}; }
static inline Floats load_int8(const uint8_t* p) {
  return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p))),
          _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)(p + 8))))};
}
static inline float one_half(const uint8_t* p) { return _cvtsh_ss((unsigned short)(p[0] | p[1] << 8)); }
static inline float sum_of(Floats x) {
  const __m256 whole = _mm256_add_ps(x.a, x.b);
  const __m128 quarter = _mm_add_ps(_mm256_castps256_ps128(whole), _mm256_extractf128_ps(whole, 1));
  const __m128 pair = _mm_add_ps(quarter, _mm_movehl_ps(quarter, quarter));
  return _mm_cvtss_f32(_mm_add_ss(pair, _mm_movehdup_ps(pair)));
}
static inline Floats operator+(Floats x, Floats y) { return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
static inline Floats operator*(Floats x, Floats y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
static inline Floats fma(Floats x, Floats y, Floats z) {
  return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)};
}
static inline void store(float* p, Floats x, int count) {
  float whole[16];
  float* to = count >= 16 ? p : whole;
  _mm256_storeu_ps(to, x.a), _mm256_storeu_ps(to + 8, x.b);
  if (to != p) std::memcpy(p, whole, sizeof(float) * count);
}
static inline Floats load_some(const float* p, int count) {
  if (count >= 16) return load(p);
  const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7), left = _mm256_set1_epi32(count);
  return {_mm256_maskload_ps(p, _mm256_cmpgt_epi32(left, lane)),
          _mm256_maskload_ps(p + 8, _mm256_cmpgt_epi32(left, _mm256_add_epi32(lane, _mm256_set1_epi32(8))))};
}

static inline void prefetch(const void* p) { _mm_prefetch((const char*)p, _MM_HINT_T0); }

static inline Ints bytes(const uint8_t* p) {
  return {_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p)),
          _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)(p + 8)))};
}
static inline Ints low_nibbles(Ints x) {
  const __m256i mask = _mm256_set1_epi32(15);
  return {_mm256_and_si256(x.a, mask), _mm256_and_si256(x.b, mask)};
}
static inline Ints high_nibbles(Ints x) { return {_mm256_srli_epi32(x.a, 4), _mm256_srli_epi32(x.b, 4)}; }
static inline Floats to_float(Ints x) { return {_mm256_cvtepi32_ps(x.a), _mm256_cvtepi32_ps(x.b)}; }
// Two halves of a table and a choice: several times as fast as gathering.
static inline __m256 pick(const float* table16, __m256i index) {
  const __m256 low = _mm256_permutevar8x32_ps(_mm256_loadu_ps(table16), index);
  const __m256 high = _mm256_permutevar8x32_ps(_mm256_loadu_ps(table16 + 8), index);
  return _mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32(index, 28)));
}
static inline Floats pick(const float* table16, Ints index) { return {pick(table16, index.a), pick(table16, index.b)}; }
static inline Floats powers(Ints e) {
  const __m256i bias = _mm256_set1_epi32(127);
  return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(e.a, bias), 23)),
          _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(e.b, bias), 23))};
}

// x * 2^exponents, in two steps, since 2^-128 alone is no normal number.
static inline Floats scaled(Floats x, const int8_t* exponents) {
  const Ints e = {_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)exponents)),
                  _mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)(exponents + 8)))};
  const Ints half = {_mm256_srai_epi32(e.a, 1), _mm256_srai_epi32(e.b, 1)};
  return x * powers(half) * powers({_mm256_sub_epi32(e.a, half.a), _mm256_sub_epi32(e.b, half.b)});
}

// Signs of 16 rows at 32 inputs.
struct Words {
  __m256i a, b;
};
static inline Words words(const uint8_t* p) {
  return {_mm256_loadu_si256((const __m256i*)p), _mm256_loadu_si256((const __m256i*)(p + 32))};
}
static inline __m256 kept(__m256i bits, __m128i up, __m256 step) {
  return _mm256_and_ps(_mm256_castsi256_ps(_mm256_srai_epi32(_mm256_sll_epi32(bits, up), 31)), step);
}
// x plus `step` in the rows that have a bit at input i.
static inline Floats plus_where(Floats x, Words bits, int i, Floats step) {
  const __m128i up = _mm_cvtsi32_si128(31 - i);
  return {_mm256_add_ps(x.a, kept(bits.a, up, step.a)), _mm256_add_ps(x.b, kept(bits.b, up, step.b))};
}

// Tokens that are multiplied at once: their sums fill the registers.
constexpr int kTokens = 3;

}  // namespace NOMUL_NAMESPACE
