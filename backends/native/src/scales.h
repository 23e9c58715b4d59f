// Scales and offsets of one group of a tile, decoded from their record.
#pragma once

#include "layout.h"

namespace NOMUL_NAMESPACE {

// What nibbles stand for. A scale starts with 2^-n, 15 being zero; an offset with +-2^-n, 7 being zero, bit 3 the sign.
// A later nibble is a step of n octaves down and the sign of the term there; a step of 0 ends the sum.
struct Nibbles {
  float scale[16], offset[16], step[16], sign[16], last[16];
};

constexpr Nibbles make_nibbles() {
  Nibbles t{};
  float power = 1.0f;
  for (int n = 0; n < 16; n++, power *= 0.5f) t.scale[n] = n < 15 ? power : 0.0f;
  for (int n = 0; n < 16; n++) {
    const int octaves = n & 7;
    const float sign = n & 8 ? -1.0f : 1.0f;
    t.sign[n] = sign;
    t.offset[n] = octaves < 7 ? sign * t.scale[octaves] : 0.0f;
    t.step[n] = octaves ? t.scale[octaves] : 0.0f;
    t.last[n] = octaves ? sign * t.scale[octaves] : 0.0f;
  }
  return t;
}

static constexpr Nibbles kNibbles = make_nibbles();

// Vector `index` of the nibbles of a record, two vectors to 16 bytes.
NOMUL_INLINE Ints nibbles_at(const uint8_t* record, int index) {
  const Ints pair = bytes(record + index / 2 * kLanes);
  return index & 1 ? high_nibbles(pair) : low_nibbles(pair);
}

// The sum 2^e0 (1 +- 2^-d1 (...)) of A nibbles from `index` on, relative to the row's power of two; exact in float32.
template <int A>
NOMUL_INLINE Floats value_at(const uint8_t* record, int index, const float* first_table) {
  const Floats first = pick(first_table, nibbles_at(record, index));
  if constexpr (A == 1) return first;
  Floats sum = pick(kNibbles.last, nibbles_at(record, index + A - 1));
#pragma GCC unroll 4
  for (int i = A - 2; i >= 1; i--) {
    const Ints nibble = nibbles_at(record, index + i);
    sum = pick(kNibbles.step, nibble) * (pick(kNibbles.sign, nibble) + sum);
  }
  return fma(first, sum, first);
}

// Scales of a group's planes and its offset. An offset has its own power of two a row, a zero point's offset has that
// of the scales.
template <int P>
struct Scales {
  Floats plane[P], offset;
};

template <int P, int A>
NOMUL_INLINE void decode_coded(const Shape& s, const uint8_t* record, Scales<P>& out) {
#pragma GCC unroll 8
  for (int i = 0; i < P; i++) out.plane[i] = value_at<A>(record, i * A, kNibbles.scale);
  if (s.offset) out.offset = value_at<A>(record, P * A, kNibbles.offset);
}

template <int P>
NOMUL_INLINE void decode_halves(const Shape& s, const uint8_t* record, Scales<P>& out) {
#pragma GCC unroll 8
  for (int i = 0; i < P; i++) out.plane[i] = load_half(record + 2 * kLanes * i);
  if (s.offset) out.offset = load_half(record + 2 * kLanes * P);
}

// A uniform code is worth scale * (code - zero), its bit i as a sign half of 2^i up or down.
template <int P>
NOMUL_INLINE void decode_tied(const Shape& s, const uint8_t* record, Scales<P>& out) {
  Floats scale;
  switch (s.terms) {
    case 0: scale = load_half(record); break;
    case 1: scale = value_at<1>(record, 0, kNibbles.scale); break;
    case 2: scale = value_at<2>(record, 0, kNibbles.scale); break;
    case 3: scale = value_at<3>(record, 0, kNibbles.scale); break;
    default: scale = value_at<4>(record, 0, kNibbles.scale);
  }
  if (s.offset == NOMUL_ZERO_POINT) {
    const Floats zero = to_float(bytes(record + s.scale_bytes - kLanes));
    out.offset = scale * fma(zero, all(-1.0f), all((float)((1 << P) - 1) * 0.5f));
  } else {
    out.offset = scale * all(-0.5f);
  }
  float half = 0.5f;
#pragma GCC unroll 8
  for (int i = 0; i < P; i++, half *= 2.0f) out.plane[i] = scale * all(half);
}

template <int P>
NOMUL_INLINE void decode_scales(const Shape& s, const uint8_t* record, Scales<P>& out) {
  if (s.tied) return decode_tied<P>(s, record, out);
  switch (s.terms) {
    case 0: return decode_halves<P>(s, record, out);
    case 1: return decode_coded<P, 1>(s, record, out);
    case 2: return decode_coded<P, 2>(s, record, out);
    case 3: return decode_coded<P, 3>(s, record, out);
    default: return decode_coded<P, 4>(s, record, out);
  }
}

}  // namespace NOMUL_NAMESPACE
