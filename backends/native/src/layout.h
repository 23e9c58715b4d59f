// Tile order, version 1: 32 rows at a time, all they need side by side, so that one thread reads one stream.
//
// A tile holds, in this order; vectors are of 16 rows, those of the tile's first half before those of its second:
//   exponents   int8[16] of the scales and int8[16] of the offsets: powers of two a row (terms > 0 only), for each half
//   scales      for each group and half one record: with terms > 0 the nibbles of `ir.ops.shiftcode.ShiftCodes`, two
//               vectors to 16 bytes (low nibble first), in the order set, term, then the offset's terms; with terms = 0
//               float16[16] for each set and the offset. Zero points follow as uint8[16].
//   padding     to a multiple of 64 bytes
//   signs       for each chunk of 32 inputs, each plane and each half uint32[16]: bit i is +1 at input i of the chunk.
//               Groups are filled up to whole chunks; what the filling multiplies is zero.
// Rows past the last are filled up with zeros.
#pragma once

#include <cstdint>

#include "nomul.h"

namespace NOMUL_NAMESPACE {

constexpr int kLanes = 16, kHalves = 2, kRows = kLanes * kHalves, kChunk = 32, kBlockChunks = 4, kMaxPlanes = 8, kMaxTerms = 4;

struct Shape {
  int planes, terms, sets, offset, tied;
  int64_t rows, inputs, groups, group, tiles;
  int64_t group_chunks, last_chunks, chunks;  // chunks a group, of the last group, in all
  int64_t exponent_bytes, scale_bytes, head_bytes, tile_bytes;
};

// A number of planes as a type.
template <int P>
struct Planes {
  static constexpr int value = P;
};

static inline int64_t over(int64_t a, int64_t b) { return (a + b - 1) / b; }

static inline Shape shape_of(const nomul_layout& l) {
  Shape s;
  s.planes = l.planes, s.terms = l.terms, s.offset = l.offset, s.tied = l.tied;
  s.sets = l.tied ? 1 : l.planes;
  s.rows = l.rows, s.inputs = l.inputs;
  s.group = l.group < l.inputs ? l.group : l.inputs;
  s.groups = over(s.inputs, s.group);
  s.tiles = over(s.rows, kRows);
  s.group_chunks = over(s.group, kChunk);
  s.last_chunks = over(s.inputs - (s.groups - 1) * s.group, kChunk);
  s.chunks = (s.groups - 1) * s.group_chunks + s.last_chunks;
  const int64_t values = s.sets + (l.offset == NOMUL_OFFSET ? 1 : 0);
  s.scale_bytes = l.terms ? over(values * l.terms, 2) * kLanes : values * 2 * kLanes;
  if (l.offset == NOMUL_ZERO_POINT) s.scale_bytes += kLanes;
  s.exponent_bytes = l.terms ? 2 * kLanes : 0;
  s.head_bytes = over(kHalves * (s.exponent_bytes + s.groups * s.scale_bytes), 64) * 64;
  s.tile_bytes = s.head_bytes + s.chunks * s.planes * kHalves * 64;
  return s;
}

// Call work(planes as a constant) for a shape's number of planes.
template <class Work>
static inline void with_planes(const Shape& s, const Work& work) {
  switch (s.planes) {
    case 1: return work(Planes<1>());
    case 2: return work(Planes<2>());
    case 3: return work(Planes<3>());
    case 4: return work(Planes<4>());
    case 5: return work(Planes<5>());
    case 6: return work(Planes<6>());
    case 7: return work(Planes<7>());
    case 8: return work(Planes<8>());
  }
}

}  // namespace NOMUL_NAMESPACE
