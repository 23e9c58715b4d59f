// The loop over tiles of rows that all levels share; `Sums` adds up what signs select from tables.
#pragma once

#include "scales.h"
#include "scratch.h"

namespace NOMUL_NAMESPACE {

// Where a run of tiles reads and writes.
struct Run {
  const Shape& shape;
  const Scratch& scratch;
  const uint8_t* weight;
  const float* bias;
  const void* tables;
  int64_t tokens, last_row;
  float* y;
};

// Compute R tiles of 16 rows from `tile` on, for M tokens from `token` on, with P planes.
template <class Sums, int P, int R, int M>
static void few_tiles(const Run& run, int64_t tile, int64_t token) {
  const Shape& s = run.shape;
  const uint8_t *head[R], *record[R], *signs[R];
  Floats y[R][M], z[R][M];
  Token t[M];
  for (int r = 0; r < R; r++) {
    head[r] = run.weight + (tile + r) * s.tile_bytes;
    record[r] = head[r] + (s.terms ? 2 * kLanes : 0);
    signs[r] = head[r] + s.head_bytes;
  }
  for (int m = 0; m < M; m++) {
    t[m] = token_of(run.scratch, run.tables, token + m);
    for (int r = 0; r < R; r++) y[r][m] = z[r][m] = zeros();
  }
  const bool offset = s.offset != NOMUL_NO_OFFSET || s.tied;
  for (int64_t g = 0; g < s.groups; g++) {
    const int64_t chunks = g + 1 < s.groups ? s.group_chunks : s.last_chunks;
    Floats sums[R][M][P];
    for (int r = 0; r < R; r++)
      for (int m = 0; m < M; m++)
        for (int p = 0; p < P; p++) sums[r][m][p] = zeros();
    for (int64_t done = 0; done < chunks; done += kBlockChunks) {
      const int now = (int)(chunks - done < kBlockChunks ? chunks - done : kBlockChunks);
      Sums::template block<P, R, M>(signs, now, t, sums);
      for (int r = 0; r < R; r++) signs[r] += now * P * 64;
      for (int m = 0; m < M; m++) t[m].tables += now * Sums::kTableBytes, t[m].factors++;
    }
    for (int r = 0; r < R; r++) {
      Scales scales;
      decode_scales<P>(s, record[r], scales);
      record[r] += s.scale_bytes;
      for (int m = 0; m < M; m++) {
        for (int p = 0; p < P; p++) y[r][m] = fma(scales.plane[p], sums[r][m][p], y[r][m]);
        if (offset) z[r][m] = fma(scales.offset, all(t[m].sums[g]), z[r][m]);
      }
    }
  }
  for (int r = 0; r < R; r++) {
    const int64_t row = (tile + r) * kLanes;
    const int count = (int)(run.last_row - row < kLanes ? run.last_row - row : kLanes);
    const int8_t* exponents = (const int8_t*)head[r];
    for (int m = 0; m < M; m++) {
      Floats out = y[r][m];
      if (s.terms) {
        out = scaled(out, exponents);
        if (offset) out = out + scaled(z[r][m], s.tied ? exponents : exponents + kLanes);
      } else if (offset) {
        out = out + z[r][m];
      }
      if (run.bias) out = out + load_some(run.bias + row, count);
      store(run.y + (token + m) * s.rows + row, out, count);
    }
  }
}

template <class Sums, int P, int R>
static void tiles_of_rows(const Run& run, int64_t tile) {
  // As many tokens at once as leave registers for their sums.
  constexpr int kMany = P * R <= 3 ? 4 : P * R <= 6 ? 2 : 1;
  int64_t token = 0;
  for (; token + kMany <= run.tokens; token += kMany) few_tiles<Sums, P, R, kMany>(run, tile, token);
  for (; token < run.tokens; token++) few_tiles<Sums, P, R, 1>(run, tile, token);
}

template <class Sums, int P>
static void all_rows(const Run& run, int64_t first_row) {
  const int64_t last = over(run.last_row, kLanes);
  int64_t tile = first_row / kLanes;
  if constexpr (P <= 4) {
    if (run.tokens == 1)
      for (; tile + 2 <= last; tile += 2) tiles_of_rows<Sums, P, 2>(run, tile);
  }
  for (; tile < last; tile++) tiles_of_rows<Sums, P, 1>(run, tile);
}

template <class Sums>
static void rows_with(const Run& run, int64_t first_row) {
  switch (run.shape.planes) {
    case 1: return all_rows<Sums, 1>(run, first_row);
    case 2: return all_rows<Sums, 2>(run, first_row);
    case 3: return all_rows<Sums, 3>(run, first_row);
    case 4: return all_rows<Sums, 4>(run, first_row);
    case 5: return all_rows<Sums, 5>(run, first_row);
    case 6: return all_rows<Sums, 6>(run, first_row);
    case 7: return all_rows<Sums, 7>(run, first_row);
    case 8: return all_rows<Sums, 8>(run, first_row);
  }
}

// Decode rows to float weights.
template <int P>
static void decode_tiles(const Shape& s, const uint8_t* weight, int64_t first_row, int64_t last_row, float* out) {
  for (int64_t tile = first_row / kLanes; tile < over(last_row, kLanes); tile++) {
    const uint8_t *head = weight + tile * s.tile_bytes, *record = head + (s.terms ? 2 * kLanes : 0);
    const uint8_t* signs = head + s.head_bytes;
    const int8_t* exponents = (const int8_t*)head;
    const bool offset = s.offset != NOMUL_NO_OFFSET || s.tied;
    const int64_t rows = last_row - tile * kLanes < kLanes ? last_row - tile * kLanes : kLanes;
    for (int64_t g = 0; g < s.groups; g++, record += s.scale_bytes) {
      Scales scales;
      decode_scales<P>(s, record, scales);
      Floats z = offset ? scales.offset : zeros();
      if (s.terms) z = scaled(z, s.tied ? exponents : exponents + kLanes);
      alignas(64) float alpha[P][kLanes], low[kLanes];
      store(low, z, kLanes);
      for (int p = 0; p < P; p++) store(alpha[p], s.terms ? scaled(scales.plane[p], exponents) : scales.plane[p], kLanes);
      const int64_t start = g * s.group, end = g + 1 < s.groups ? start + s.group : s.inputs;
      for (int64_t i = start; i < end; i += kChunk, signs += P * 64)
        for (int64_t k = i; k < (i + kChunk < end ? i + kChunk : end); k++)
          for (int64_t r = 0; r < rows; r++) {
            double w = low[r];
            for (int p = 0; p < P; p++) {
              uint32_t bits;
              std::memcpy(&bits, signs + p * 64 + r * 4, 4);
              w += bits >> (k - i) & 1 ? (double)alpha[p][r] : -(double)alpha[p][r];
            }
            out[(tile * kLanes - first_row + r) * s.inputs + k] = (float)w;
          }
    }
  }
}

static inline void decode_rows(const Shape& s, const uint8_t* weight, int64_t first, int64_t last, float* out) {
  switch (s.planes) {
    case 1: return decode_tiles<1>(s, weight, first, last, out);
    case 2: return decode_tiles<2>(s, weight, first, last, out);
    case 3: return decode_tiles<3>(s, weight, first, last, out);
    case 4: return decode_tiles<4>(s, weight, first, last, out);
    case 5: return decode_tiles<5>(s, weight, first, last, out);
    case 6: return decode_tiles<6>(s, weight, first, last, out);
    case 7: return decode_tiles<7>(s, weight, first, last, out);
    case 8: return decode_tiles<8>(s, weight, first, last, out);
  }
}

}  // namespace NOMUL_NAMESPACE
