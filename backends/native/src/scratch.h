// What the row kernels look up, made once from the activations and read by every row.
//
// A token's scratch holds the tables of its chunks, then one factor for each block of at most four chunks of a group,
// then the sum of the activations of each group.
#pragma once

#include <cstring>
#include <limits>

#include "layout.h"

namespace NOMUL_NAMESPACE {

struct Scratch {
  int64_t table_bytes;  // of one chunk
  int64_t blocks, factors_at, sums_at, token_bytes;
};

static inline int64_t blocks_of(const Shape& s) {
  return (s.groups - 1) * over(s.group_chunks, kBlockChunks) + over(s.last_chunks, kBlockChunks);
}

static inline Scratch scratch_of(const Shape& s, int64_t table_bytes) {
  Scratch r;
  r.table_bytes = table_bytes;
  r.blocks = blocks_of(s);
  r.factors_at = s.chunks * table_bytes;
  r.sums_at = r.factors_at + over(r.blocks * 4, 64) * 64;
  r.token_bytes = r.sums_at + over(s.groups * 4, 64) * 64;
  return r;
}

struct Token {
  const uint8_t* tables;
  const float *factors, *sums;
};

static inline Token token_of(const Scratch& at, const void* scratch, int64_t token) {
  const uint8_t* p = (const uint8_t*)scratch + token * at.token_bytes;
  return {p, (const float*)(p + at.factors_at), (const float*)(p + at.sums_at)};
}

// Eight sums that do not wait for each other.
static inline double block_sum(const float* x, int chunks) {
  double lanes[8] = {};
  for (int i = 0; i < chunks * kChunk; i += 8)
    for (int j = 0; j < 8; j++) lanes[j] += x[i + j];
  return ((lanes[0] + lanes[4]) + (lanes[1] + lanes[5])) + ((lanes[2] + lanes[6]) + (lanes[3] + lanes[7]));
}

// Call make(activations[128], chunks, tables, factor) for every block of a token; the block is filled up with zeros.
template <class Make>
static inline void each_block(const Shape& s, const Scratch& at, const float* x, void* scratch, const Make& make) {
  uint8_t* tables = (uint8_t*)scratch;
  float* factor = (float*)((uint8_t*)scratch + at.factors_at);
  float* sums = (float*)((uint8_t*)scratch + at.sums_at);
  for (int64_t g = 0; g < s.groups; g++) {
    const int64_t start = g * s.group, end = g + 1 < s.groups ? start + s.group : s.inputs;
    double sum = 0.0;
    for (int64_t i = start; i < end; i += kBlockChunks * kChunk) {
      alignas(64) float block[kBlockChunks * kChunk] = {};
      const int64_t count = end - i < kBlockChunks * kChunk ? end - i : kBlockChunks * kChunk;
      std::memcpy(block, x + i, sizeof(float) * count);
      const int chunks = (int)over(count, kChunk);
      sum += block_sum(block, chunks);
      make(block, chunks, tables, factor);
      // Whole numbers have no NaN: what they stand for has to be none.
      if (sum - sum != 0.0) *factor = std::numeric_limits<float>::quiet_NaN();
      factor++;
      tables += chunks * at.table_bytes;
    }
    sums[g] = (float)sum;
  }
}

// All sums of four numbers with signs: entry c takes +x[b] where c has bit b, -x[b] elsewhere.
static inline void four_sums(const float* x, float* sums) {
  for (int c = 0; c < 16; c++) {
    sums[c] = 0.0f;
    for (int b = 0; b < 4; b++) sums[c] += c >> b & 1 ? x[b] : -x[b];
  }
}

// Tables of float sums, one for each four inputs.
static inline void float_tables(const float* x, int chunks, uint8_t* tables, float* factor) {
  for (int n = 0; n < chunks * kChunk / 4; n++) four_sums(x + 4 * n, (float*)tables + 16 * n);
  *factor = 1.0f;
}

constexpr int64_t kFloatTableBytes = kChunk / 4 * 16 * 4;

template <class Make>
static inline void prepare_with(const nomul_layout& l, int64_t table_bytes, const float* x, int64_t tokens,
                                void* scratch, const Make& make) {
  const Shape s = shape_of(l);
  const Scratch at = scratch_of(s, table_bytes);
  for (int64_t t = 0; t < tokens; t++) each_block(s, at, x + t * s.inputs, (uint8_t*)scratch + t * at.token_bytes, make);
}

}  // namespace NOMUL_NAMESPACE
