// Weights as the tiles of AMX take them: whole numbers of at most 32639 times a row's unit, each as two int8.
#pragma once

#include <cstring>
#include <limits>

#include "kernels.h"
#include "lanes_avx512.h"
#include "scales.h"
#include "stored.h"

namespace NOMUL_NAMESPACE {

// A tile register holds 16 rows of 64 bytes. A step are 64 inputs, which it covers; a block are 256 inputs, whose
// products of int8 are added in 32 bits before they are scaled.
constexpr int64_t kTile = 1024, kParts = 2;
constexpr int kStep = 64, kStepChunks = kStep / kChunk, kWide = 256, kWideChunks = kWide / kChunk;
// Signs of 32 rows at a chunk, of one plane.
constexpr int kPlaneBytes = kHalves * 64;
constexpr int64_t kStepBytes = kParts * kTile, kHalfBytes = kWide / kStep * kStepBytes;
// The largest number that two int8 can be of, 256 a + b.
constexpr float kLargest = 32639.0f;

// A block of 32 rows: [half][step][part][16 rows][64 inputs], and what a row's 1 stands for.
struct Strip {
  alignas(64) uint8_t parts[kHalves * kHalfBytes];
  alignas(64) float unit[kRows];
  uint8_t* at(int half, int lane, int chunk) {
    return parts + half * kHalfBytes + chunk / kStepChunks * kStepBytes + lane * kStep + chunk % kStepChunks * kChunk;
  }
};

// What sixteen rows or tokens are multiplied with in a block so that no value exceeds kLargest, and what a 1 stands for
// then: no number where a value is none.
struct Scaling {
  __m512 scale, unit;
};

static inline __m512 scale_of(__m512 top) {
  // Scales stay within the range of floats.
  const __m512 most = _mm512_set1_ps(0.125f * std::numeric_limits<float>::max());
  const __mmask16 some = _mm512_cmp_ps_mask(top, _mm512_setzero_ps(), _CMP_GT_OQ);
  return _mm512_maskz_min_ps(some, _mm512_div_ps(_mm512_set1_ps(kLargest), top), most);
}

static inline Scaling with_unit(__m512 scale, __m512 top) {
  const __mmask16 finite = _mm512_cmp_ps_mask(top, _mm512_set1_ps(std::numeric_limits<float>::max()), _CMP_LE_OQ);
  const __mmask16 some = _mm512_cmp_ps_mask(scale, _mm512_setzero_ps(), _CMP_GT_OQ);
  const __m512 unit = _mm512_maskz_div_ps(some, _mm512_set1_ps(1.0f), scale);
  return {scale, _mm512_mask_mov_ps(_mm512_set1_ps(std::numeric_limits<float>::quiet_NaN()), finite, unit)};
}

static inline Scaling scaling_of(__m512 top) { return with_unit(scale_of(top), top); }

// Weights are scaled by powers of two: those that are sums of a few powers of two are then whole numbers, and are not
// rounded.
static inline Scaling weight_scaling(__m512 top) {
  return with_unit(_mm512_scalef_ps(_mm512_set1_ps(1.0f), _mm512_getexp_ps(scale_of(top))), top);
}

// The largest size of `count` values, a multiple of 16; no number where one is not finite.
static inline float largest(const float* values, int count) {
  constexpr int kNotFinite = 0x01 | 0x08 | 0x10 | 0x80;
  __m512 top = _mm512_setzero_ps();
  __mmask16 bad = 0;
  for (int i = 0; i < count; i += kLanes) {
    const __m512 a = _mm512_load_ps(values + i);
    bad |= _mm512_fpclass_ps_mask(a, kNotFinite), top = _mm512_max_ps(top, _mm512_abs_ps(a));
  }
  return bad ? std::numeric_limits<float>::quiet_NaN() : _mm512_reduce_max_ps(top);
}

// Round sixteen values to 256 a + b: the larger parts a, and the smaller ones.
static inline void store_parts(__m512 values, uint8_t* larger, uint8_t* smaller) {
  const __m512i n = _mm512_cvtps_epi32(values);
  const __m512i a = _mm512_srai_epi32(_mm512_add_epi32(n, _mm512_set1_epi32(128)), 8);
  _mm_store_si128((__m128i*)larger, _mm512_cvtepi32_epi8(a));
  _mm_store_si128((__m128i*)smaller, _mm512_cvtepi32_epi8(n));
}

// Compressed weights: planes [First, First + Count) of P; the offset goes with the first planes.
template <int P, int First, int Count>
struct Tables {
  // A group that has a part in the block: its lowest value, the step up of each plane, its largest size.
  struct Group {
    alignas(64) float low[kRows], step[Count][kRows], top[kRows];
    int64_t chunks;
  };
  const Shape* shape = nullptr;
  const uint8_t *head = nullptr, *record = nullptr, *signs = nullptr;
  int64_t next = 0, left = 0;
  Group groups[kWideChunks];
  int count = 0;
  // The two parts of every choice of signs, for each row of a group.
  static constexpr int kEntries = 1 << Count, kRowsAtOnce = Count < 4 ? kLanes >> Count : 1;
  alignas(64) uint8_t values[kParts][kRows * kEntries];

  void start(const nomul_job<nomul_layout>& job, const Shape& s, int64_t index) {
    const uint8_t* tile = job.weight + index * s.tile_bytes;
    shape = &s, head = tile, record = tile + kHalves * s.exponent_bytes, signs = tile + s.head_bytes;
    next = left = count = 0;
  }

  void read(Group& group) {
    const Shape& s = *shape;
    const bool offset = First == 0 && (s.offset != NOMUL_NO_OFFSET || s.tied);
    for (int h = 0; h < kHalves; h++, record += s.scale_bytes) {
      const int8_t* exponents = (const int8_t*)head + h * s.exponent_bytes;
      Scales<P> scales;
      decode_scales<P>(s, record, scales);
      __m512 low = _mm512_setzero_ps();
      if (offset) low = (s.terms ? scaled(scales.offset, s.tied ? exponents : exponents + kLanes) : scales.offset).v;
      __m512 top = _mm512_abs_ps(low);
      for (int p = 0; p < Count; p++) {
        const __m512 alpha = (s.terms ? scaled(scales.plane[First + p], exponents) : scales.plane[First + p]).v;
        low = _mm512_sub_ps(low, alpha), top = _mm512_add_ps(top, _mm512_abs_ps(alpha));
        _mm512_store_ps(group.step[p] + h * kLanes, _mm512_add_ps(alpha, alpha));
      }
      _mm512_store_ps(group.low + h * kLanes, low);
      _mm512_store_ps(group.top + h * kLanes, top);
    }
    left = ++next < s.groups ? s.group_chunks : s.last_chunks;
  }

  // Find the groups of the next `chunks` chunks, the first of which may have begun before.
  void find_groups(int64_t chunks) {
    if (left) groups[0] = groups[count - 1];
    for (count = 0; chunks > 0; count++) {
      if (!left) read(groups[count]);
      groups[count].chunks = left < chunks ? left : chunks;
      left -= groups[count].chunks, chunks -= groups[count].chunks;
    }
  }

  // Write the values of all choices of signs, times the scales of the rows; a vector takes those of some rows at once.
  void tabulate(const Group& group, const __m512* scales) {
    constexpr __mmask16 kHas[4] = {0xAAAA, 0xCCCC, 0xF0F0, 0xFF00};
    const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m512i rows = _mm512_srli_epi32(lanes, Count < 4 ? Count : 4);
    for (int h = 0; h < kHalves; h++) {
      const auto times_scale = [&](const float* v) { return _mm512_mul_ps(_mm512_load_ps(v + h * kLanes), scales[h]); };
      const __m512 low = times_scale(group.low);
      __m512 step[Count];
      for (int p = 0; p < Count; p++) step[p] = times_scale(group.step[p]);
      for (int lane = 0; lane < kLanes; lane += kRowsAtOnce) {
        const __m512i index = _mm512_add_epi32(_mm512_set1_epi32(lane), rows);
        __m512 a = _mm512_permutexvar_ps(index, low);
        for (int p = 0; p < (Count < 4 ? Count : 4); p++)
          a = _mm512_mask_add_ps(a, kHas[p], a, _mm512_permutexvar_ps(index, step[p]));
        const int at = (h * kLanes + lane) * kEntries;
        store_parts(a, values[0] + at, values[1] + at);
        if constexpr (Count > 4) {
          a = _mm512_add_ps(a, _mm512_permutexvar_ps(index, step[Count - 1]));
          store_parts(a, values[0] + at + kLanes, values[1] + at + kLanes);
        }
      }
    }
  }

  // The entries of a row over and over.
  static __m512i table_of(const uint8_t* entries) {
    const auto as = [&](auto number) { return std::memcpy(&number, entries, sizeof number), number; };
    if constexpr (Count == 1) return _mm512_set1_epi16(as(int16_t()));
    else if constexpr (Count == 2) return _mm512_set1_epi32(as(int32_t()));
    else if constexpr (Count == 3) return _mm512_set1_epi64(as(int64_t()));
    else if constexpr (Count == 4) return _mm512_broadcast_i32x4(_mm_load_si128((const __m128i*)entries));
    else return _mm512_broadcast_i64x4(_mm256_load_si256((const __m256i*)entries));
  }
  static __m256i pick(const uint8_t* entries, __m256i index) {
    const __m256i table = _mm512_castsi512_si256(table_of(entries));
    return Count > 4 ? _mm256_permutexvar_epi8(index, table) : _mm256_shuffle_epi8(table, index);
  }
  static __m512i pick(const uint8_t* entries, __m512i index) {
    const __m512i table = table_of(entries);
    return Count > 4 ? _mm512_permutexvar_epi8(index, table) : _mm512_shuffle_epi8(table, index);
  }

  // Write 16 rows of a chunk, whose signs at each plane are 64 bytes.
  static void half_chunk(const uint8_t* bits, const uint8_t* larger, const uint8_t* smaller, uint8_t* to) {
#pragma GCC unroll 4
    for (int lane = 0; lane < kLanes; lane++, bits += 4, larger += kEntries, smaller += kEntries, to += kStep) {
      __m256i index = _mm256_setzero_si256();
#pragma GCC unroll 5
      for (int p = 0; p < Count; p++)
        index = _mm256_mask_add_epi8(index, word(bits + p * kPlaneBytes), index, _mm256_set1_epi8((char)(1 << p)));
      _mm256_store_si256((__m256i*)to, pick(larger, index));
      _mm256_store_si256((__m256i*)(to + kTile), pick(smaller, index));
    }
  }

  // The same of two chunks of a group that are one step.
  static void half_step(const uint8_t* bits, const uint8_t* larger, const uint8_t* smaller, uint8_t* to) {
#pragma GCC unroll 4
    for (int lane = 0; lane < kLanes; lane++, bits += 4, larger += kEntries, smaller += kEntries, to += kStep) {
      __m512i index = _mm512_setzero_si512();
#pragma GCC unroll 5
      for (int p = 0; p < Count; p++) {
        const uint64_t both = word(bits + p * kPlaneBytes) | (uint64_t)word(bits + (P + p) * kPlaneBytes) << 32;
        index = _mm512_mask_add_epi8(index, both, index, _mm512_set1_epi8((char)(1 << p)));
      }
      _mm512_store_si512(to, pick(larger, index));
      _mm512_store_si512(to + kTile, pick(smaller, index));
    }
  }

  static uint32_t word(const uint8_t* bits) {
    uint32_t found;
    std::memcpy(&found, bits, sizeof found);
    return found;
  }

  // Write the next chunk, or two where they are one step and have the same scales; returns how many.
  int write(Strip& out, int place, int64_t left_of_group) {
    const bool step = place % kStepChunks == 0 && left_of_group >= kStepChunks;
    for (int h = 0; h < kHalves; h++) {
      const uint8_t* bits = signs + First * kPlaneBytes + h * 64;
      const uint8_t *larger = values[0] + h * kLanes * kEntries, *smaller = values[1] + h * kLanes * kEntries;
      if (step) half_step(bits, larger, smaller, out.at(h, 0, place));
      else half_chunk(bits, larger, smaller, out.at(h, 0, place));
    }
    const int done = step ? kStepChunks : 1;
    signs += done * P * kPlaneBytes;
    return done;
  }

  // Read the next `chunks` chunks, a block or less.
  void block(Strip& out, int64_t chunks) {
    find_groups(chunks);
    __m512 scales[kHalves];
    for (int h = 0; h < kHalves; h++) {
      __m512 top = _mm512_setzero_ps();
      for (int g = 0; g < count; g++) top = _mm512_max_ps(top, _mm512_load_ps(groups[g].top + h * kLanes));
      const Scaling s = weight_scaling(top);
      scales[h] = s.scale;
      _mm512_store_ps(out.unit + h * kLanes, s.unit);
    }
    for (int g = 0, place = 0; g < count; g++) {
      tabulate(groups[g], scales);
      const int end = place + (int)groups[g].chunks;
      while (place < end) place += write(out, place, end - place);
    }
  }
};

// Weights of 16-bit floats or int8, row after row.
template <int Kind>
struct Rows {
  const nomul_dense* dense = nullptr;
  const uint8_t* weight = nullptr;
  int64_t first = 0, next = 0;

  void start(const nomul_job<nomul_dense>& job, const nomul_dense& d, int64_t index) {
    dense = &d, weight = job.weight, first = index * kRows, next = 0;
  }

  // The inputs of a row from `next` on.
  void read(int64_t row, int64_t inputs, float* out) const {
    for (int64_t k = 0; k < inputs; k += kLanes) {
      const int count = (int)(inputs - k < kLanes ? inputs - k : kLanes);
      _mm512_store_ps(out + k, weights_at<Kind>(*dense, weight, row, next + k, count).v);
    }
  }

  void block(Strip& out, int64_t chunks) {
    const int64_t inputs = dense->inputs - next < kWide ? dense->inputs - next : kWide;
    for (int row = 0; row < kRows; row++) {
      alignas(64) float values[kWide] = {};
      if (first + row < dense->rows) read(first + row, inputs, values);
      const Scaling s = weight_scaling(_mm512_set1_ps(largest(values, kWide)));
      out.unit[row] = _mm512_cvtss_f32(s.unit);
      for (int k = 0; k < chunks * kChunk; k += kLanes) {
        uint8_t* to = out.at(row / kLanes, row % kLanes, k / kChunk) + k % kChunk;
        store_parts(_mm512_mul_ps(_mm512_load_ps(values + k), s.scale), to, to + kTile);
      }
    }
    next += kWide;
  }
};

}  // namespace NOMUL_NAMESPACE
