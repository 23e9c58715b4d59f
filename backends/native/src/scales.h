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

// Reads vectors of 16 nibbles, two to 16 bytes.
struct NibbleReader {
  const uint8_t* p;
  Ints pair;
  bool second = false;

  inline Ints next() {
    if (second) {
      second = false, p += kLanes;
      return high_nibbles(pair);
    }
    second = true, pair = bytes(p);
    return low_nibbles(pair);
  }
};

// The sum 2^e0 (1 +- 2^-d1 (...)) of `terms` nibbles, relative to the row's power of two; exact in float32.
static inline Floats value_of(NibbleReader& from, int terms, const float* first_table) {
  const Floats first = pick(first_table, from.next());
  if (terms == 1) return first;
  Ints later[kMaxTerms - 1];
  for (int i = 0; i < terms - 1; i++) later[i] = from.next();
  Floats sum = pick(kNibbles.last, later[terms - 2]);
  for (int i = terms - 3; i >= 0; i--) sum = pick(kNibbles.step, later[i]) * (pick(kNibbles.sign, later[i]) + sum);
  return fma(first, sum, first);
}

// Scales of a group's planes and its offset. An offset has its own power of two a row, a zero point's offset has that
// of the scales.
struct Scales {
  Floats plane[kMaxPlanes], offset;
};

template <int P>
static inline void decode_scales(const Shape& s, const uint8_t* record, Scales& out) {
  if (s.terms) {
    NibbleReader from{record, {}};
    for (int i = 0; i < (s.tied ? 1 : P); i++) out.plane[i] = value_of(from, s.terms, kNibbles.scale);
    if (s.offset == NOMUL_OFFSET) out.offset = value_of(from, s.terms, kNibbles.offset);
  } else {
    for (int i = 0; i < s.sets; i++) out.plane[i] = load_half(record + 2 * kLanes * i);
    if (s.offset == NOMUL_OFFSET) out.offset = load_half(record + 2 * kLanes * s.sets);
  }
  if (!s.tied) return;
  // A uniform code is worth scale * (code - zero), its bit i as a sign half of 2^i up or down.
  const Floats scale = out.plane[0];
  if (s.offset == NOMUL_ZERO_POINT) {
    const Floats zero = to_float(bytes(record + s.scale_bytes - kLanes));
    out.offset = scale * fma(zero, all(-1.0f), all((float)((1 << P) - 1) * 0.5f));
  } else {
    out.offset = scale * all(-0.5f);
  }
  float half = 0.5f;
  for (int i = 0; i < P; i++, half *= 2.0f) out.plane[i] = scale * all(half);
}

}  // namespace NOMUL_NAMESPACE
