// AMX: many tokens are multiplied in bfloat16 tiles, with float32 sums; few are looked up as at the level avx512.
//
// A float is the sum of two bfloat16 and of what is left, 2^-17 of it: three products of tiles take all but the product
// of the two smaller parts. With 8-bit sums the larger parts alone do.
#define NOMUL_NAMESPACE nomul_amx
#include <cstring>

#include "kernels.h"
#include "lanes_avx512.h"
#include "scales.h"
#include "stored.h"

namespace NOMUL_NAMESPACE {

// A tile register holds 16 rows of 64 bytes: of weights, 16 rows at a chunk's inputs; of activations, a chunk's 16 pairs
// of inputs for 16 tokens.
constexpr int64_t kTile = 1024, kParts = 2;
// Chunks that are decoded before they are multiplied, and tiles of rows that share what is read of the activations.
constexpr int64_t kStrip = 8, kTogether = 4;
// Tokens from which decoding the weight once is faster than looking up.
constexpr int64_t kMany = 24, kManyDense = 9;
// Planes that a table of 32 values covers; more are taken in two rounds.
constexpr int kTablePlanes = 5;

static inline int64_t token_tiles(int64_t tokens) { return over(tokens, kLanes); }

// How the inputs of a weight fall into chunks: groups are filled up to whole ones.
struct Chunks {
  int64_t inputs, group, groups, count;
  int64_t token_tile_bytes() const { return count * kParts * kTile; }
};

static inline Chunks chunks_of(const Shape& s) { return {s.inputs, s.group, s.groups, s.chunks}; }
static inline Chunks chunks_of(const nomul_dense& d) { return {d.inputs, d.inputs, 1, over(d.inputs, kChunk)}; }

struct Halves {
  __m512i first, second;
};

// Two bfloat16 that add up to each of 32 floats but for 2^-17 of it.
static inline Halves split(__m512 a, __m512 b) {
  const __m512i first = (__m512i)_mm512_cvtne2ps_pbh(b, a);
  const __m512i of_a = _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_castsi512_si256(first)), 16);
  const __m512i of_b = _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(first, 1)), 16);
  const __m512 rest_a = _mm512_sub_ps(a, _mm512_castsi512_ps(of_a)), rest_b = _mm512_sub_ps(b, _mm512_castsi512_ps(of_b));
  return {first, (__m512i)_mm512_cvtne2ps_pbh(rest_b, rest_a)};
}

// Turn 16 rows of 16 words by the side.
static inline void turn(const uint8_t* rows, uint8_t* columns) {
  const __m512i places = _mm512_slli_epi32(_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15), 4);
  for (int i = 0; i < kLanes; i++) _mm512_store_si512(columns + 64 * i, _mm512_i32gather_epi32(places, rows + 4 * i, 4));
}

// Activations as [token tile][chunk][part], tokens and inputs filled up with zeros.
static void split_tokens(const Chunks& c, const float* x, int64_t tokens, uint8_t* out) {
  for (int64_t first = 0; first < tokens; first += kLanes) {
    const int64_t count = tokens - first < kLanes ? tokens - first : kLanes;
    for (int64_t g = 0; g < c.groups; g++) {
      const int64_t end = g + 1 < c.groups ? (g + 1) * c.group : c.inputs;
      for (int64_t k = g * c.group; k < end; k += kChunk, out += kParts * kTile) {
        alignas(64) uint8_t rows[kParts][kTile] = {};
        const int64_t inputs = end - k < kChunk ? end - k : kChunk;
        for (int64_t t = 0; t < count; t++) {
          alignas(64) float chunk[kChunk] = {};
          std::memcpy(chunk, x + (first + t) * c.inputs + k, sizeof(float) * inputs);
          const Halves parts = split(_mm512_load_ps(chunk), _mm512_load_ps(chunk + 16));
          _mm512_store_si512(rows[0] + 64 * t, parts.first);
          _mm512_store_si512(rows[1] + 64 * t, parts.second);
        }
        for (int part = 0; part < kParts; part++) turn(rows[part], out + part * kTile);
      }
    }
  }
}

// Reads a tile of 32 rows of a weight chunk after chunk, as [half][part][16 rows][32 inputs].
//
// Of compressed weights: planes [First, First + Count) of P; the offset goes with the first planes.
template <int P, int First, int Count>
struct Tables {
  const Shape* shape = nullptr;
  const uint8_t *head = nullptr, *record = nullptr, *signs = nullptr;
  int64_t group = -1, left = 0;
  // For each row the value of every choice of signs, as two bfloat16.
  alignas(64) uint8_t values[kRows][kParts][64];

  void start(const nomul_job<nomul_layout>& job, const Shape& s, int64_t index) {
    const uint8_t* tile = job.weight + index * s.tile_bytes;
    shape = &s, head = tile, record = tile + kHalves * s.exponent_bytes, signs = tile + s.head_bytes;
    group = -1, left = 0;
  }

  void next_group() {
    const Shape& s = *shape;
    const bool offset = First == 0 && (s.offset != NOMUL_NO_OFFSET || s.tied);
    for (int h = 0; h < kHalves; h++, record += s.scale_bytes) {
      const int8_t* exponents = (const int8_t*)head + h * s.exponent_bytes;
      Scales<P> scales;
      decode_scales<P>(s, record, scales);
      Floats low = offset ? scales.offset : zeros();
      if (offset && s.terms) low = scaled(low, s.tied ? exponents : exponents + kLanes);
      alignas(64) float base[kLanes], step[Count][kLanes];
      for (int p = 0; p < Count; p++) {
        const Floats alpha = s.terms ? scaled(scales.plane[First + p], exponents) : scales.plane[First + p];
        low = fma(alpha, all(-1.0f), low);
        store(step[p], alpha + alpha, kLanes);
      }
      store(base, low, kLanes);
      for (int lane = 0; lane < kLanes; lane++) {
        constexpr __mmask16 kHas[4] = {0xAAAA, 0xCCCC, 0xF0F0, 0xFF00};
        __m512 a = _mm512_set1_ps(base[lane]);
        for (int p = 0; p < (Count < 4 ? Count : 4); p++) a = _mm512_mask_add_ps(a, kHas[p], a, _mm512_set1_ps(step[p][lane]));
        const Halves parts = split(a, Count > 4 ? _mm512_add_ps(a, _mm512_set1_ps(step[Count - 1][lane])) : a);
        _mm512_store_si512(values[h * kLanes + lane][0], parts.first);
        _mm512_store_si512(values[h * kLanes + lane][1], parts.second);
      }
    }
    left = ++group + 1 < s.groups ? s.group_chunks : s.last_chunks;
  }

  void chunk(uint8_t* out) {
    if (!left) next_group();
    left--;
    for (int row = 0; row < kRows; row++) {
      const int half = row / kLanes, lane = row % kLanes;
      __m512i index = _mm512_setzero_si512();
#pragma GCC unroll 5
      for (int p = 0; p < Count; p++) {
        uint32_t bits;
        std::memcpy(&bits, signs + ((First + p) * kHalves + half) * 64 + lane * 4, 4);
        index = _mm512_mask_add_epi16(index, bits, index, _mm512_set1_epi16((int16_t)(1 << p)));
      }
      uint8_t* to = out + half * kParts * kTile + lane * 64;
      _mm512_store_si512(to, _mm512_permutexvar_epi16(index, _mm512_load_si512(values[row][0])));
      _mm512_store_si512(to + kTile, _mm512_permutexvar_epi16(index, _mm512_load_si512(values[row][1])));
    }
    signs += P * kHalves * 64;
  }
};

// Of bfloat16: as stored, the second part being nothing.
struct Stored {
  const uint8_t* weight = nullptr;
  int64_t inputs = 0, rows = 0, next = 0;

  void start(const nomul_job<nomul_dense>& job, const nomul_dense& d, int64_t index) {
    weight = job.weight + index * kRows * d.inputs * 2, inputs = d.inputs, next = 0;
    rows = d.rows - index * kRows < kRows ? d.rows - index * kRows : kRows;
  }

  void chunk(uint8_t* out) {
    const int64_t count = inputs - next < kChunk ? inputs - next : kChunk;
    const __mmask32 some = (__mmask32)((1ull << count) - 1);
    for (int64_t r = 0; r < kRows; r++) {
      const __mmask32 there = r < rows ? some : 0;
      const __m512i values = _mm512_maskz_loadu_epi16(there, weight + (r * inputs + next) * 2);
      _mm512_store_si512(out + r / kLanes * kParts * kTile + r % kLanes * 64, values);
    }
    next += kChunk;
  }
};

// Of int8 with scales: a chunk is a block of one scale.
struct Scaled {
  const nomul_dense* dense = nullptr;
  const uint8_t* weight = nullptr;
  int64_t first = 0, next = 0;

  void start(const nomul_job<nomul_dense>& job, const nomul_dense& d, int64_t index) {
    dense = &d, weight = job.weight, first = index * kRows, next = 0;
  }

  void chunk(uint8_t* out) {
    const int64_t left = dense->inputs - next;
    for (int64_t r = 0; r < kRows; r++) {
      const auto half = [&](int64_t from) {
        const int64_t count = left - from < kLanes ? left - from : kLanes;
        if (first + r >= dense->rows || count <= 0) return _mm512_setzero_ps();
        return weights_at<NOMUL_INT8>(*dense, weight, first + r, next + from, (int)count).v;
      };
      const Halves parts = split(half(0), half(kLanes));
      uint8_t* to = out + r / kLanes * kParts * kTile + r % kLanes * 64;
      _mm512_store_si512(to, parts.first);
      _mm512_store_si512(to + kTile, parts.second);
    }
    next += kChunk;
  }
};

// Which products of parts are added: of the larger parts, all but that of the smaller, or those of whole weights.
enum class Products { kLarger, kThree, kWhole };

struct Config {
  uint8_t palette = 1, start = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

template <int T>
NOMUL_INLINE void add_products(const uint8_t* w, const uint8_t* x, int64_t token_tile) {
  _tile_loadd(4, w, 64);
  _tile_loadd(5, w + kParts * kTile, 64);
  _tile_loadd(6, x, 64);
  _tile_dpbf16ps(0, 4, 6);
  _tile_dpbf16ps(1, 5, 6);
  if constexpr (T == 2) {
    _tile_loadd(7, x + token_tile, 64);
    _tile_dpbf16ps(2, 4, 7);
    _tile_dpbf16ps(3, 5, 7);
  }
}

// Add the products of a strip to sums [T token tiles][2 halves][16 rows][16 tokens].
template <int T>
static inline void multiply(const uint8_t* w, const uint8_t* x, int64_t token_tile, int64_t chunks, Products products,
                            float* sums) {
  _tile_loadd(0, sums, 64);
  _tile_loadd(1, sums + 256, 64);
  if constexpr (T == 2) {
    _tile_loadd(2, sums + 512, 64);
    _tile_loadd(3, sums + 768, 64);
  }
  for (int64_t i = 0; i < chunks; i++, x += kParts * kTile, w += kHalves * kParts * kTile) {
    add_products<T>(w, x, token_tile);
    if (products == Products::kLarger) continue;
    add_products<T>(w, x + kTile, token_tile);
    if (products == Products::kThree) add_products<T>(w + kTile, x, token_tile);
  }
  _tile_stored(0, sums, 64);
  _tile_stored(1, sums + 256, 64);
  if constexpr (T == 2) {
    _tile_stored(2, sums + 512, 64);
    _tile_stored(3, sums + 768, 64);
  }
}

// A thread's own memory: the weights of a strip, then the sums of a tile of rows for all tokens; for each tile of rows.
constexpr int64_t kStripBytes = kStrip * kHalves * kParts * kTile;
static inline int64_t sums_bytes(int64_t tokens) { return token_tiles(tokens) * kHalves * kTile; }

// Add the products of `count` tiles of rows with all tokens; whole: what readers of tiles start from.
template <class Reader, class Form, class Whole>
static void add_tiles(const nomul_job<Form>& job, const Whole& whole, Products products, int64_t tile, int64_t count,
                      uint8_t* strips, float* sums) {
  const Chunks c = chunks_of(whole);
  const int64_t tiles = token_tiles(job.tokens), step = c.token_tile_bytes(), each = sums_bytes(job.tokens) / 4;
  Reader readers[kTogether];
  for (int64_t r = 0; r < count; r++) readers[r].start(job, whole, tile + r);
  for (int64_t first = 0; first < c.count; first += kStrip) {
    const int64_t chunks = c.count - first < kStrip ? c.count - first : kStrip;
    for (int64_t r = 0; r < count; r++)
      for (int64_t i = 0; i < chunks; i++) readers[r].chunk(strips + r * kStripBytes + i * kHalves * kParts * kTile);
    const uint8_t* x = (const uint8_t*)job.scratch + first * kParts * kTile;
    for (int64_t t = 0; t < tiles; t += 2)
      for (int64_t r = 0; r < count; r++) {
        const uint8_t* w = strips + r * kStripBytes;
        float* to = sums + r * each + t * 512;
        if (t + 2 <= tiles) multiply<2>(w, x + t * step, step, chunks, products, to);
        else multiply<1>(w, x + t * step, step, chunks, products, to);
      }
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
  uint8_t* strips = (uint8_t*)spare;
  float* sums = (float*)(strips + kTogether * kStripBytes);
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

static int64_t tile_spare_bytes(int64_t tokens) { return kTogether * (kStripBytes + sums_bytes(tokens)); }

static bool by_tiles(int64_t tokens, int32_t mode) { return mode != NOMUL_EXACT && tokens >= kMany; }

static int64_t scratch_bytes(const nomul_layout& l, int64_t tokens, int32_t mode) {
  if (!by_tiles(tokens, mode)) return nomul_avx512_kernels()->tiled.scratch_bytes(l, tokens, mode);
  return token_tiles(tokens) * chunks_of(shape_of(l)).token_tile_bytes();
}

static void prepare(const nomul_layout& l, int32_t mode, const float* x, int64_t tokens, void* scratch) {
  if (by_tiles(tokens, mode)) split_tokens(chunks_of(shape_of(l)), x, tokens, (uint8_t*)scratch);
  else nomul_avx512_kernels()->tiled.prepare(l, mode, x, tokens, scratch);
}

static int64_t spare_bytes(const nomul_layout& l, int64_t tokens, int32_t mode) {
  return by_tiles(tokens, mode) ? tile_spare_bytes(tokens) : nomul_avx512_kernels()->tiled.spare_bytes(l, tokens, mode);
}

static void rows(const nomul_job<nomul_layout>& job, void* spare) {
  if (!by_tiles(job.tokens, job.mode)) return nomul_avx512_kernels()->tiled.rows(job, spare);
  const Shape s = shape_of(job.form);
  const Products products = job.mode == NOMUL_8_BIT ? Products::kLarger : Products::kThree;
  each_tile(job, spare, [&](int64_t tile, int64_t count, uint8_t* strips, float* sums) {
    with_planes(s, [&](auto planes) {
      constexpr int P = planes.value, kFirst = P < kTablePlanes ? P : kTablePlanes;
      add_tiles<Tables<P, 0, kFirst>>(job, s, products, tile, count, strips, sums);
      if constexpr (P > kFirst) add_tiles<Tables<P, kFirst, P - kFirst>>(job, s, products, tile, count, strips, sums);
    });
  });
}

static bool by_tiles(const nomul_dense& d, int64_t tokens, int32_t mode) {
  return mode != NOMUL_EXACT && d.kind != NOMUL_FLOAT16 && tokens >= kManyDense;
}

static int64_t dense_scratch_bytes(const nomul_dense& d, int64_t tokens, int32_t mode) {
  if (!by_tiles(d, tokens, mode)) return nomul_avx512_kernels()->dense.scratch_bytes(d, tokens, mode);
  return token_tiles(tokens) * chunks_of(d).token_tile_bytes();
}

static void dense_prepare(const nomul_dense& d, int32_t mode, const float* x, int64_t tokens, void* scratch) {
  if (by_tiles(d, tokens, mode)) split_tokens(chunks_of(d), x, tokens, (uint8_t*)scratch);
  else nomul_avx512_kernels()->dense.prepare(d, mode, x, tokens, scratch);
}

static int64_t dense_spare_bytes(const nomul_dense& d, int64_t tokens, int32_t mode) {
  return by_tiles(d, tokens, mode) ? tile_spare_bytes(tokens)
                                   : nomul_avx512_kernels()->dense.spare_bytes(d, tokens, mode);
}

static void dense_rows(const nomul_job<nomul_dense>& job, void* spare) {
  if (!by_tiles(job.form, job.tokens, job.mode)) return nomul_avx512_kernels()->dense.rows(job, spare);
  const bool whole = job.form.kind == NOMUL_BFLOAT16;
  const Products all = whole ? Products::kWhole : Products::kThree;
  const Products products = job.mode == NOMUL_8_BIT ? Products::kLarger : all;
  each_tile(job, spare, [&](int64_t tile, int64_t count, uint8_t* strips, float* sums) {
    if (whole) add_tiles<Stored>(job, job.form, products, tile, count, strips, sums);
    else add_tiles<Scaled>(job, job.form, products, tile, count, strips, sums);
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
