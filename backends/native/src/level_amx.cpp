// AMX: many tokens are multiplied in tiles of int8, with 32-bit sums; few are looked up as at the level avx512.
//
// Activations and weights are rounded to whole numbers 256 a + b of the largest among 256 inputs, so that a and b are
// int8; the products of the parts are added up by themselves.
#define NOMUL_NAMESPACE nomul_amx
#include <utility>

#include "amx_weights.h"

namespace NOMUL_NAMESPACE {

// Tiles of rows that share what is read of the activations.
constexpr int64_t kTogether = 4;
// Tokens from which decoding the weight once is faster than looking up.
constexpr int64_t kMany = 24, kManyDense = 9;
// Planes that a table of 32 values covers; more are taken in two rounds.
constexpr int kTablePlanes = 5;
// Activations of 16 tokens at a block of inputs: what a token's 1 stands for, then [step][part][16 quads of inputs][token].
constexpr int64_t kUnitBytes = kLanes * sizeof(float), kBlockBytes = kUnitBytes + kHalfBytes;

static inline int64_t token_tiles(int64_t tokens) { return over(tokens, kLanes); }

// How the inputs of a weight fall into chunks: groups are filled up to whole ones.
struct Chunks {
  int64_t inputs, group, group_chunks, count;
  int64_t blocks() const { return over(count, kWideChunks); }
  int64_t token_tile_bytes() const { return blocks() * kBlockBytes; }
  // The inputs of a chunk: the first, and how many there are.
  int64_t first(int64_t chunk) const { return chunk / group_chunks * group + chunk % group_chunks * kChunk; }
  int64_t size(int64_t chunk) const {
    const int64_t end = (chunk / group_chunks + 1) * group, last = end < inputs ? end : inputs;
    return last - first(chunk) < kChunk ? last - first(chunk) : kChunk;
  }
};

static inline Chunks chunks_of(const Shape& s) { return {s.inputs, s.group, s.group_chunks, s.chunks}; }
static inline Chunks chunks_of(const nomul_dense& d) {
  const int64_t count = over(d.inputs, kChunk);
  return {d.inputs, d.inputs, count, count};
}

// Turn 16 rows of 16 words by the side.
static inline void turn(const uint8_t* rows, uint8_t* columns) {
  const __m512i places = _mm512_slli_epi32(_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15), 4);
  for (int i = 0; i < kLanes; i++) _mm512_store_si512(columns + 64 * i, _mm512_i32gather_epi32(places, rows + 4 * i, 4));
}

// The numbers of a token in a block as two int8, row `lane` of the tiles [step][part][16 tokens][64 inputs]; those of 8
// bits have no smaller part. Returns what 1 in the last part stands for.
static float split_token(const float* values, int32_t mode, int lane, uint8_t* out) {
  const bool byte = mode == NOMUL_8_BIT;
  const Scaling s = scaling_of(_mm512_set1_ps(largest(values, kWide)));
  // What is rounded to 8 bits is the larger part, as a whole number of 256.
  const __m512 scale = _mm512_mul_ps(s.scale, _mm512_set1_ps(byte ? 1.0f / 256.0f : 1.0f));
  for (int k = 0; k < kWide; k += kLanes) {
    uint8_t *larger = out + k / kStep * kStepBytes + lane * kStep + k % kStep, *smaller = larger + kTile;
    if (byte) std::swap(larger, smaller);
    store_parts(_mm512_mul_ps(_mm512_load_ps(values + k), scale), larger, smaller);
  }
  return _mm512_cvtss_f32(s.unit) * (byte ? 256.0f : 1.0f);
}

// Activations as [token tile][block], tokens and inputs filled up with zeros.
static void split_tokens(const Chunks& c, int32_t mode, const float* x, int64_t tokens, uint8_t* out) {
  for (int64_t first = 0; first < tokens; first += kLanes) {
    const int64_t count = tokens - first < kLanes ? tokens - first : kLanes;
    for (int64_t block = 0; block < c.count; block += kWideChunks, out += kBlockBytes) {
      alignas(64) uint8_t parts[kHalfBytes] = {};
      std::memset(out, 0, kUnitBytes);
      for (int64_t t = 0; t < count; t++) {
        alignas(64) float values[kWide] = {};
        for (int64_t i = 0; i < kWideChunks && block + i < c.count; i++)
          std::memcpy(values + i * kChunk, x + (first + t) * c.inputs + c.first(block + i), sizeof(float) * c.size(block + i));
        ((float*)out)[t] = split_token(values, mode, (int)t, parts);
      }
      for (int64_t tile = 0; tile < kHalfBytes; tile += kTile) turn(parts + tile, out + kUnitBytes + tile);
    }
  }
}

struct Config {
  uint8_t palette = 1, start = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// Add sums [parts][16 rows][16 tokens], of which each counts 256 times the next, to those of floats.
template <int Parts>
NOMUL_INLINE void add_scaled(const int32_t* found, const float* row_unit, const float* token_unit, float* sums) {
  const __m512 units = _mm512_load_ps(token_unit);
#pragma GCC unroll 16
  for (int r = 0; r < kLanes; r++) {
    __m512 all = _mm512_cvtepi32_ps(_mm512_load_si512(found + r * kLanes));
#pragma GCC unroll 2
    for (int part = 1; part < Parts; part++) {
      const __m512 next = _mm512_cvtepi32_ps(_mm512_load_si512(found + part * kLanes * kLanes + r * kLanes));
      all = _mm512_fmadd_ps(all, _mm512_set1_ps(256.0f), next);
    }
    all = _mm512_mul_ps(all, _mm512_set1_ps(row_unit[r]));
    _mm512_store_ps(sums + r * kLanes, _mm512_fmadd_ps(all, units, _mm512_load_ps(sums + r * kLanes)));
  }
}

// Add the products of 16 rows and 16 T tokens at a block to sums [T][2 halves][16 rows][16 tokens]. Both: activations
// have a smaller part; tiles 0 to 2, and 3 to 5 of the second token tile, then are a c, a d + b c and b d, else a c and b c.
template <int T, bool Both>
static inline void multiply(const uint8_t* w, const float* row_unit, const uint8_t* x, int64_t token_tile, int64_t steps,
                            float* sums) {
  constexpr int kSums = Both ? 3 : 2;
  alignas(64) int32_t found[T][kSums][kLanes * kLanes];
  const uint8_t* from = x + kUnitBytes;
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  _tile_zero(4);
  _tile_zero(5);
  for (int64_t i = 0; i < steps; i++, w += kStepBytes, from += kStepBytes) {
    const uint8_t* second = from + token_tile;
    _tile_loadd(6, w, 64);
    _tile_loadd(7, from, 64);
    _tile_dpbssd(0, 6, 7);
    if constexpr (T == 2) {
      _tile_loadd(7, second, 64);
      _tile_dpbssd(3, 6, 7);
    }
    if constexpr (Both) {
      _tile_loadd(7, from + kTile, 64);
      _tile_dpbssd(1, 6, 7);
      if constexpr (T == 2) {
        _tile_loadd(7, second + kTile, 64);
        _tile_dpbssd(4, 6, 7);
      }
      _tile_loadd(6, w + kTile, 64);
      _tile_loadd(7, from + kTile, 64);
      _tile_dpbssd(2, 6, 7);
      if constexpr (T == 2) {
        _tile_loadd(7, second + kTile, 64);
        _tile_dpbssd(5, 6, 7);
      }
    } else {
      _tile_loadd(6, w + kTile, 64);
    }
    _tile_loadd(7, from, 64);
    _tile_dpbssd(1, 6, 7);
    if constexpr (T == 2) {
      _tile_loadd(7, second, 64);
      _tile_dpbssd(4, 6, 7);
    }
  }
  _tile_stored(0, found[0][0], 64);
  _tile_stored(1, found[0][1], 64);
  if constexpr (Both) _tile_stored(2, found[0][2], 64);
  if constexpr (T == 2) {
    _tile_stored(3, found[1][0], 64);
    _tile_stored(4, found[1][1], 64);
    if constexpr (Both) _tile_stored(5, found[1][2], 64);
  }
  for (int t = 0; t < T; t++)
    add_scaled<kSums>(found[t][0], row_unit, (const float*)(x + t * token_tile), sums + t * 512);
}

// A thread's own memory: a block of the weights, then the sums of a tile of rows for all tokens; for each tile of rows.
static inline int64_t sums_bytes(int64_t tokens) { return token_tiles(tokens) * kHalves * kTile; }

// Add the products of tiles of rows at a block with all tokens.
template <bool Both>
static void add_block(const Strip* strips, int64_t count, const uint8_t* x, int64_t token_tile, int64_t tokens,
                      int64_t steps, float* sums) {
  const int64_t tiles = token_tiles(tokens), each = sums_bytes(tokens) / 4;
  for (int64_t t = 0; t < tiles; t += 2)
    for (int64_t r = 0; r < count; r++)
      for (int h = 0; h < kHalves; h++) {
        const uint8_t *w = strips[r].parts + h * kHalfBytes, *from = x + t * token_tile;
        const float* unit = strips[r].unit + h * kLanes;
        float* to = sums + r * each + t * 512 + h * 256;
        if (t + 2 <= tiles) multiply<2, Both>(w, unit, from, token_tile, steps, to);
        else multiply<1, Both>(w, unit, from, token_tile, steps, to);
      }
}

// Add the products of `count` tiles of rows with all tokens; whole: what readers of tiles start from.
template <class Reader, class Form, class Whole>
static void add_tiles(const nomul_job<Form>& job, const Whole& whole, int64_t tile, int64_t count, Strip* strips,
                      float* sums) {
  const Chunks c = chunks_of(whole);
  Reader readers[kTogether];
  for (int64_t r = 0; r < count; r++) readers[r].start(job, whole, tile + r);
  const uint8_t* x = (const uint8_t*)job.scratch;
  for (int64_t first = 0; first < c.count; first += kWideChunks, x += kBlockBytes) {
    const int64_t chunks = c.count - first < kWideChunks ? c.count - first : kWideChunks;
    for (int64_t r = 0; r < count; r++) readers[r].block(strips[r], chunks);
    const auto add = job.mode == NOMUL_8_BIT ? add_block<false> : add_block<true>;
    add(strips, count, x, c.token_tile_bytes(), job.tokens, over(chunks, kStepChunks), sums);
  }
}

template <class Form>
static void store_sums(const nomul_job<Form>& job, int64_t row, const float* sums) {
  alignas(64) uint8_t turned[kTile];
  for (int half = 0; half < kHalves; half++) {
    const int64_t first = row + half * kLanes, left = job.last_row - first;
    if (left <= 0) return;
    const int count = (int)(left < kLanes ? left : kLanes);
    const Floats bias = job.bias ? load_some(job.bias + first, count) : zeros();
    for (int64_t t = 0; t < job.tokens; t++) {
      if (t % kLanes == 0) turn((const uint8_t*)(sums + t / kLanes * 512 + half * 256), turned);
      store(job.y + t * job.form.rows + first, load((const float*)turned + t % kLanes * 16) + bias, count);
    }
  }
}

// Compute all tiles of rows of a job; add(tile, count, strips, sums) adds the products of some.
template <class Form, class Add>
static void each_tile(const nomul_job<Form>& job, void* spare, const Add& add) {
  Strip* strips = (Strip*)spare;
  float* sums = (float*)(strips + kTogether);
  const Config config;
  _tile_loadconfig(&config);
  const int64_t last = over(job.last_row, kRows);
  for (int64_t tile = job.first_row / kRows; tile < last; tile += kTogether) {
    const int64_t count = last - tile < kTogether ? last - tile : kTogether;
    std::memset(sums, 0, count * sums_bytes(job.tokens));
    add(tile, count, strips, sums);
    for (int64_t r = 0; r < count; r++) store_sums(job, (tile + r) * kRows, sums + r * sums_bytes(job.tokens) / 4);
  }
  // Threads are the runtime's: it may use tiles of another form next.
  _tile_release();
}

static int64_t tile_spare_bytes(int64_t tokens) {
  return kTogether * ((int64_t)sizeof(Strip) + sums_bytes(tokens));
}

static bool by_tiles(int64_t tokens, int32_t mode) { return mode != NOMUL_EXACT && tokens >= kMany; }

static int64_t scratch_bytes(const nomul_layout& l, int64_t tokens, int32_t mode) {
  if (!by_tiles(tokens, mode)) return nomul_avx512_kernels()->tiled.scratch_bytes(l, tokens, mode);
  return token_tiles(tokens) * chunks_of(shape_of(l)).token_tile_bytes();
}

static void prepare(const nomul_layout& l, int32_t mode, const float* x, int64_t tokens, void* scratch) {
  if (by_tiles(tokens, mode)) split_tokens(chunks_of(shape_of(l)), mode, x, tokens, (uint8_t*)scratch);
  else nomul_avx512_kernels()->tiled.prepare(l, mode, x, tokens, scratch);
}

static int64_t spare_bytes(const nomul_layout& l, int64_t tokens, int32_t mode) {
  return by_tiles(tokens, mode) ? tile_spare_bytes(tokens) : nomul_avx512_kernels()->tiled.spare_bytes(l, tokens, mode);
}

static void rows(const nomul_job<nomul_layout>& job, void* spare) {
  if (!by_tiles(job.tokens, job.mode)) return nomul_avx512_kernels()->tiled.rows(job, spare);
  const Shape s = shape_of(job.form);
  each_tile(job, spare, [&](int64_t tile, int64_t count, Strip* strips, float* sums) {
    with_planes(s, [&](auto planes) {
      constexpr int P = planes.value, kFirst = P < kTablePlanes ? P : kTablePlanes;
      add_tiles<Tables<P, 0, kFirst>>(job, s, tile, count, strips, sums);
      if constexpr (P > kFirst) add_tiles<Tables<P, kFirst, P - kFirst>>(job, s, tile, count, strips, sums);
    });
  });
}

static bool many_dense(int64_t tokens, int32_t mode) { return mode != NOMUL_EXACT && tokens >= kManyDense; }

static int64_t dense_scratch_bytes(const nomul_dense& d, int64_t tokens, int32_t mode) {
  if (!many_dense(tokens, mode)) return nomul_avx512_kernels()->dense.scratch_bytes(d, tokens, mode);
  return token_tiles(tokens) * chunks_of(d).token_tile_bytes();
}

static void dense_prepare(const nomul_dense& d, int32_t mode, const float* x, int64_t tokens, void* scratch) {
  if (many_dense(tokens, mode)) split_tokens(chunks_of(d), mode, x, tokens, (uint8_t*)scratch);
  else nomul_avx512_kernels()->dense.prepare(d, mode, x, tokens, scratch);
}

static int64_t dense_spare_bytes(const nomul_dense& d, int64_t tokens, int32_t mode) {
  return many_dense(tokens, mode) ? tile_spare_bytes(tokens)
                                  : nomul_avx512_kernels()->dense.spare_bytes(d, tokens, mode);
}

static void dense_rows(const nomul_job<nomul_dense>& job, void* spare) {
  if (!many_dense(job.tokens, job.mode)) return nomul_avx512_kernels()->dense.rows(job, spare);
  each_tile(job, spare, [&](int64_t tile, int64_t count, Strip* strips, float* sums) {
    switch (job.form.kind) {
      case NOMUL_BFLOAT16: return add_tiles<Rows<NOMUL_BFLOAT16>>(job, job.form, tile, count, strips, sums);
      case NOMUL_FLOAT16: return add_tiles<Rows<NOMUL_FLOAT16>>(job, job.form, tile, count, strips, sums);
      default: return add_tiles<Rows<NOMUL_INT8>>(job, job.form, tile, count, strips, sums);
    }
  });
}

}  // namespace NOMUL_NAMESPACE

const nomul_kernels* nomul_amx_kernels() {
  using namespace NOMUL_NAMESPACE;
  static const nomul_kernels k = {"amx",
                                  {scratch_bytes, prepare, spare_bytes, rows},
                                  {dense_scratch_bytes, dense_prepare, dense_spare_bytes, dense_rows},
                                  nomul_avx512_kernels()->hadamard,
                                  nomul_avx512_kernels()->decode};
  return &k;
}
