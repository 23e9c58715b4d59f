// The loop over tiles of rows that all levels share; `Sums` adds up what signs select from tables.
#pragma once

#include "columns.h"
#include "kernels.h"
#include "scratch.h"

namespace NOMUL_NAMESPACE {

// A job with what follows from it.
struct Run {
  const nomul_job<nomul_layout>& job;
  const Shape shape;
  const Scratch scratch;
};

// Tiles that are walked side by side. Memory is read faster from several places at once than from one, however far
// ahead it is asked for, and the tables of a block are read from the first cache by all but the first of them.
constexpr int kAbreast = 4;

// Where the walk through a tile has come to, and the sums of R of its halves for M tokens.
template <int R, int M>
struct Walk {
  const uint8_t *head, *record, *signs;
  Floats y[R][M], z[R][M];
};

template <int R, int M>
static void store_rows(const Run& run, const Walk<R, M>& walk, int64_t tile, int half, int64_t token) {
  const Shape& s = run.shape;
  const bool offset = s.offset != NOMUL_NO_OFFSET || s.tied;
  for (int r = 0; r < R; r++) {
    const int64_t row = tile * kRows + (half + r) * kLanes;
    const int64_t left = run.job.last_row - row;
    if (left <= 0) break;
    const int8_t* exponents = (const int8_t*)walk.head + (half + r) * s.exponent_bytes;
    for (int m = 0; m < M; m++) {
      Floats out = walk.y[r][m];
      if (s.terms) {
        out = scaled(out, exponents);
        if (offset) out = out + scaled(walk.z[r][m], s.tied ? exponents : exponents + kLanes);
      } else if (offset) {
        out = out + walk.z[r][m];
      }
      const int count = (int)(left < kLanes ? left : kLanes);
      if (run.job.bias) out = out + load_some(run.job.bias + row, count);
      store(run.job.y + (token + m) * s.rows + row, out, count);
    }
  }
}

// Compute R halves from `half` on of tiles [first, first + count), for M tokens from `token` on, with P planes.
template <class Sums, int P, int R, int M>
static void few_rows(const Run& run, int64_t first, int64_t count, int half, int64_t token) {
  const Shape& s = run.shape;
  const bool offset = s.offset != NOMUL_NO_OFFSET || s.tied;
  Walk<R, M> walks[kAbreast];
  for (int64_t i = 0; i < count; i++) {
    Walk<R, M>& walk = walks[i];
    walk.head = run.job.weight + (first + i) * s.tile_bytes;
    walk.record = walk.head + kHalves * s.exponent_bytes + half * s.scale_bytes;
    walk.signs = walk.head + s.head_bytes + half * 64;
    for (int r = 0; r < R; r++)
      for (int m = 0; m < M; m++) walk.y[r][m] = walk.z[r][m] = zeros();
  }
  Token t[M];
#pragma GCC unroll 8
  for (int m = 0; m < M; m++) t[m] = token_of(run.scratch, run.job.scratch, token + m);
  for (int64_t g = 0; g < s.groups; g++) {
    const int64_t chunks = g + 1 < s.groups ? s.group_chunks : s.last_chunks;
    for (int64_t i = 0; i < count; i++) {
      Walk<R, M>& walk = walks[i];
      Floats sums[R][M][P];
#pragma GCC unroll 8
      for (int r = 0; r < R; r++)
#pragma GCC unroll 8
        for (int m = 0; m < M; m++)
#pragma GCC unroll 8
          for (int p = 0; p < P; p++) sums[r][m][p] = zeros();
      Token at[M];
#pragma GCC unroll 8
      for (int m = 0; m < M; m++) at[m] = t[m];
      for (int64_t done = 0; done < chunks; done += kBlockChunks) {
        const int now = (int)(chunks - done < kBlockChunks ? chunks - done : kBlockChunks);
        Sums::template block<P, R, M>(walk.signs, now, at, sums);
        walk.signs += now * P * kHalves * 64;
#pragma GCC unroll 8
        for (int m = 0; m < M; m++) at[m].tables += now * Sums::kTableBytes, at[m].factors++;
      }
      // The scales of the tiles that come next: too short a stream for the CPU to see it coming.
      prefetch(walk.record + kAbreast * s.tile_bytes);
#pragma GCC unroll 8
      for (int r = 0; r < R; r++) {
        Scales<P> scales;
        decode_scales<P>(s, walk.record + r * s.scale_bytes, scales);
#pragma GCC unroll 8
        for (int m = 0; m < M; m++) {
#pragma GCC unroll 8
          for (int p = 0; p < P; p++) walk.y[r][m] = fma(scales.plane[p], sums[r][m][p], walk.y[r][m]);
          if (offset) walk.z[r][m] = fma(scales.offset, all(t[m].sums[g]), walk.z[r][m]);
        }
      }
      walk.record += kHalves * s.scale_bytes;
      if (i + 1 == count)
#pragma GCC unroll 8
        for (int m = 0; m < M; m++) t[m].tables = at[m].tables, t[m].factors = at[m].factors;
    }
  }
  for (int64_t i = 0; i < count; i++) store_rows<R, M>(run, walks[i], first + i, half, token);
}

// One token takes both halves at once; several share what one half selects, as many as leave registers for the sums.
// Sums that take whole tiles have both halves always.
template <class Sums, int P>
static void all_rows(const Run& run) {
  constexpr bool kWhole = Sums::kWholeTiles;
  constexpr int kTogether = kWhole ? 2 : P <= 3 ? 4 : P <= 6 ? 2 : 1;
  constexpr int kHalvesOfMany = kWhole ? 2 : 1, kHalvesOfOne = kWhole || P <= 6 ? 2 : 1;
  const nomul_job<nomul_layout>& job = run.job;
  const int64_t last = over(job.last_row, kRows);
  for (int64_t tile = job.first_row / kRows; tile < last; tile += kAbreast) {
    const int64_t count = last - tile < kAbreast ? last - tile : kAbreast;
    int64_t token = 0;
    for (; kTogether > 1 && token + kTogether <= job.tokens; token += kTogether)
      for (int half = 0; half < kHalves; half += kHalvesOfMany)
        few_rows<Sums, P, kHalvesOfMany, kTogether>(run, tile, count, half, token);
    for (; token < job.tokens; token++)
      for (int half = 0; half < kHalves; half += kHalvesOfOne)
        few_rows<Sums, P, kHalvesOfOne, 1>(run, tile, count, half, token);
  }
}

template <class Sums>
static void rows_with(const nomul_job<nomul_layout>& job, int64_t table_bytes) {
  const Shape s = shape_of(job.form);
  const Run run = {job, s, scratch_of(s, table_bytes)};
  with_planes(s, [&](auto planes) { all_rows<Sums, planes.value>(run); });
}

// Decode rows to float weights.
template <int P>
static void decode_tiles(const Shape& s, const uint8_t* weight, int64_t first_row, int64_t last_row, float* out) {
  const bool offset = s.offset != NOMUL_NO_OFFSET || s.tied;
  for (int64_t first = first_row; first < last_row; first += kLanes) {
    const int64_t half = first / kLanes % kHalves, rows = last_row - first < kLanes ? last_row - first : kLanes;
    const uint8_t* head = weight + first / kRows * s.tile_bytes;
    const uint8_t* record = head + kHalves * s.exponent_bytes + half * s.scale_bytes;
    const uint8_t* signs = head + s.head_bytes + half * 64;
    const int8_t* exponents = (const int8_t*)head + half * s.exponent_bytes;
    for (int64_t g = 0; g < s.groups; g++, record += kHalves * s.scale_bytes) {
      Scales<P> scales;
      decode_scales<P>(s, record, scales);
      alignas(64) float alpha[P][kLanes], low[kLanes] = {};
      if (offset) {
        const Floats z = scales.offset;
        store(low, s.terms ? scaled(z, s.tied ? exponents : exponents + kLanes) : z, kLanes);
      }
      for (int p = 0; p < P; p++) store(alpha[p], s.terms ? scaled(scales.plane[p], exponents) : scales.plane[p], kLanes);
      const int64_t start = g * s.group, end = g + 1 < s.groups ? start + s.group : s.inputs;
      for (int64_t i = start; i < end; i += kChunk, signs += P * kHalves * 64)
        for (int64_t k = i; k < (i + kChunk < end ? i + kChunk : end); k++)
          for (int64_t r = 0; r < rows; r++) {
            double w = low[r];
            for (int p = 0; p < P; p++) {
              uint32_t bits;
              std::memcpy(&bits, signs + p * kHalves * 64 + r * 4, 4);
              w += bits >> (k - i) & 1 ? (double)alpha[p][r] : -(double)alpha[p][r];
            }
            out[(first - first_row + r) * s.inputs + k] = (float)w;
          }
    }
  }
}

static void decode(const nomul_layout& l, const uint8_t* weight, int64_t first, int64_t last, float* out) {
  const Shape s = shape_of(l);
  with_planes(s, [&](auto planes) { decode_tiles<planes.value>(s, weight, first, last, out); });
}

}  // namespace NOMUL_NAMESPACE
