// Choice of a level, checks of arguments, and the C interface.
#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <memory>
#include <new>
#include <string>
#include <thread>
#include <vector>

#define NOMUL_NAMESPACE nomul_plain
#include "kernels.h"
#include "layout.h"

namespace {

thread_local char reason[256];

int refuse(int code, const char* format, long long a = 0, long long b = 0) {
  std::snprintf(reason, sizeof reason, format, a, b);
  return code;
}

bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}

bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vnni");
}

// From the slowest to the fastest that this CPU runs.
const std::vector<const nomul_kernels*>& runnable() {
  static const std::vector<const nomul_kernels*> found = [] {
    std::vector<const nomul_kernels*> list = {nomul_portable_kernels()};
#if defined(__x86_64__)
    if (has_avx2()) list.push_back(nomul_avx2_kernels());
    if (has_avx512()) list.push_back(nomul_avx512_kernels());
#endif
    return list;
  }();
  return found;
}

const nomul_kernels* named(const char* name) {
  for (const nomul_kernels* k : runnable())
    if (std::strcmp(k->name, name) == 0) return k;
  return nullptr;
}

// NOMUL_LEVEL forces a level, so that every one can be tested on one machine; a level that cannot run is kept as null.
std::atomic<const nomul_kernels*>& chosen() {
  static std::atomic<const nomul_kernels*> level = [] {
    const char* forced = std::getenv("NOMUL_LEVEL");
    return forced && *forced ? named(forced) : runnable().back();
  }();
  return level;
}

int no_level() {
  const char* forced = std::getenv("NOMUL_LEVEL");
  std::snprintf(reason, sizeof reason, "NOMUL_LEVEL is %s, and this CPU runs %s", forced ? forced : "no longer set",
                nomul_levels());
  return NOMUL_NO_SUCH_LEVEL;
}

// Bytes that no machine has: sizes up to here are computed without overflow.
constexpr int64_t kMost = (int64_t)1 << 46;

int check(const nomul_layout* l) {
  if (!l) return refuse(NOMUL_BAD_LAYOUT, "no layout was given");
  if (l->version != NOMUL_LAYOUT_VERSION)
    return refuse(NOMUL_BAD_LAYOUT, "the weight has layout version %lld, this library reads %lld", l->version,
                  NOMUL_LAYOUT_VERSION);
  if (l->rows < 1 || l->inputs < 1 || l->rows > INT32_MAX || l->inputs > INT32_MAX)
    return refuse(NOMUL_BAD_LAYOUT, "a weight cannot be %lld x %lld", l->rows, l->inputs);
  if (l->planes < 1 || l->planes > nomul_plain::kMaxPlanes)
    return refuse(NOMUL_BAD_LAYOUT, "there are kernels for 1 to 8 planes, not %lld", l->planes);
  if (l->group < 1) return refuse(NOMUL_BAD_LAYOUT, "a group cannot have %lld inputs", l->group);
  if (l->terms < 0 || l->terms > nomul_plain::kMaxTerms)
    return refuse(NOMUL_BAD_LAYOUT, "a scale has 0 to 4 terms, not %lld", l->terms);
  if (l->tied < 0 || l->tied > 1 || l->offset < 0 || l->offset > 2 || (l->tied ? l->offset == 1 : l->offset == 2))
    return refuse(NOMUL_BAD_LAYOUT, "offsets of kind %lld do not go with tied = %lld", l->offset, l->tied);
  const nomul_plain::Shape s = nomul_plain::shape_of(*l);
  if (s.tiles > kMost / s.tile_bytes)
    return refuse(NOMUL_BAD_LAYOUT, "a weight of %lld x %lld is larger than any memory", l->rows, l->inputs);
  return NOMUL_OK;
}

int check(const nomul_layout* l, int32_t mode, int64_t tokens) {
  if (const int code = check(l)) return code;
  if (!chosen().load()) return no_level();
  if (mode < NOMUL_EXACT || mode > NOMUL_8_BIT) return refuse(NOMUL_BAD_ARGUMENT, "there is no mode %lld", mode);
  // Tables of a chunk take at most half of these 1024 bytes.
  if (tokens < 0 || tokens > kMost / (1024 * nomul_plain::shape_of(*l).chunks))
    return refuse(NOMUL_BAD_ARGUMENT, "there cannot be %lld tokens", tokens);
  return NOMUL_OK;
}

int check_rows(const nomul_layout* l, int64_t first_row, int64_t last_row) {
  if (first_row % 32 || first_row < 0 || last_row > l->rows || first_row > last_row)
    return refuse(NOMUL_BAD_ARGUMENT, "rows %lld to %lld cannot be computed by themselves", first_row, last_row);
  return NOMUL_OK;
}

int null_pointer() { return refuse(NOMUL_BAD_ARGUMENT, "a pointer is null"); }

struct Free {
  void operator()(void* p) const { std::free(p); }
};

// Rows of a piece of work: enough that a thread's start does not count.
constexpr int64_t kPiece = 256;

}  // namespace

extern "C" {

int64_t nomul_weight_bytes(const nomul_layout* l) {
  if (check(l)) return -1;
  const nomul_plain::Shape s = nomul_plain::shape_of(*l);
  return s.tiles * s.tile_bytes;
}

int64_t nomul_scratch_bytes(const nomul_layout* l, int64_t tokens, int32_t mode) {
  return check(l, mode, tokens) ? -1 : chosen().load()->scratch_bytes(*l, tokens, mode);
}

int nomul_prepare(const nomul_layout* l, int32_t mode, const float* x, int64_t tokens, void* scratch) {
  if (const int code = check(l, mode, tokens)) return code;
  if (!x || !scratch || (uintptr_t)scratch % 64)
    return refuse(NOMUL_BAD_ARGUMENT, "activations and a scratch at a multiple of 64 bytes are needed");
  chosen().load()->prepare(*l, mode, x, tokens, scratch);
  return NOMUL_OK;
}

int nomul_rows(const nomul_layout* l, int32_t mode, const uint8_t* weight, const float* bias, const void* scratch,
               int64_t tokens, int64_t first_row, int64_t last_row, float* y) {
  if (const int code = check(l, mode, tokens)) return code;
  if (const int code = check_rows(l, first_row, last_row)) return code;
  if (!weight || !y || !scratch) return null_pointer();
  if ((uintptr_t)scratch % 64) return refuse(NOMUL_BAD_ARGUMENT, "a scratch at a multiple of 64 bytes is needed");
  if (first_row < last_row) chosen().load()->rows(*l, mode, weight, bias, scratch, tokens, first_row, last_row, y);
  return NOMUL_OK;
}

int nomul_many_rows(const nomul_layout* l, const uint8_t* weight, const float* bias, const float* x, int64_t tokens,
                    int64_t first_row, int64_t last_row, float* y) {
  if (const int code = check(l, NOMUL_EXACT, tokens)) return code;
  if (const int code = check_rows(l, first_row, last_row)) return code;
  if (!weight || !y || !x) return null_pointer();
  static thread_local std::unique_ptr<void, Free> spare;
  static thread_local int64_t size = 0;
  const int64_t bytes = l->inputs * 32 * (int64_t)sizeof(float);
  if (size < bytes) {
    spare.reset(std::aligned_alloc(64, bytes));
    size = spare ? bytes : 0;
    if (!spare) return refuse(NOMUL_BAD_ARGUMENT, "%lld bytes of scratch cannot be had", bytes);
  }
  if (first_row < last_row)
    chosen().load()->many_rows(*l, weight, bias, x, tokens, first_row, last_row, y, (float*)spare.get());
  return NOMUL_OK;
}

int nomul_linear(const nomul_layout* l, int32_t mode, const uint8_t* weight, int64_t weight_bytes, const float* bias,
                 const float* x, int64_t tokens, float* y, int32_t threads) {
  if (const int code = check(l, mode, tokens)) return code;
  if (tokens == 0) return NOMUL_OK;
  if (!weight || !y || !x) return null_pointer();
  if (weight_bytes != nomul_weight_bytes(l))
    return refuse(NOMUL_BAD_ARGUMENT, "the weight has %lld bytes, its layout needs %lld", weight_bytes,
                  nomul_weight_bytes(l));
  if (threads < 1) return refuse(NOMUL_BAD_ARGUMENT, "there cannot be %lld threads", threads);
  const nomul_kernels* k = chosen().load();
  const bool many = tokens >= NOMUL_MANY;
  const int64_t bytes = many ? 0 : k->scratch_bytes(*l, tokens, mode);
  std::unique_ptr<void, Free> scratch(std::aligned_alloc(64, std::max<int64_t>(64, (bytes + 63) / 64 * 64)));
  if (!scratch) return refuse(NOMUL_BAD_ARGUMENT, "%lld bytes of scratch cannot be had", bytes);
  if (!many) k->prepare(*l, mode, x, tokens, scratch.get());
  const int64_t pieces = (l->rows + kPiece - 1) / kPiece;
  std::atomic<int64_t> next{0};
  std::atomic<int> failed{0};
  const auto work = [&] {
    for (int64_t i; (i = next++) < pieces;) {
      const int64_t first = i * kPiece, last = std::min(l->rows, first + kPiece);
      if (!many) k->rows(*l, mode, weight, bias, scratch.get(), tokens, first, last, y);
      else if (const int code = nomul_many_rows(l, weight, bias, x, tokens, first, last, y)) failed = code;
    }
  };
  std::vector<std::thread> others;
  try {
    others.reserve(std::min<int64_t>(threads, pieces));
    for (int64_t i = 1; i < std::min<int64_t>(threads, pieces); i++) others.emplace_back(work);
  } catch (const std::exception&) {
    // Where no more threads can be had, those that run do it all.
  }
  work();
  for (std::thread& other : others) other.join();
  return failed ? refuse(failed, "a thread has no memory for a decoded tile") : NOMUL_OK;
}

int nomul_decode(const nomul_layout* l, const uint8_t* weight, int64_t first_row, int64_t last_row, float* out) {
  if (const int code = check(l, NOMUL_EXACT, 0)) return code;
  if (const int code = check_rows(l, first_row, last_row)) return code;
  if (!weight || !out) return null_pointer();
  chosen().load()->decode(*l, weight, first_row, last_row, out);
  return NOMUL_OK;
}

int nomul_hadamard(const float* x, int64_t tokens, int64_t width, const float* signs, int32_t signs_last,
                   int64_t factors, const int64_t* sizes, const float* const* columns, float* y) {
  if (!chosen().load()) return no_level();
  if (tokens == 0) return NOMUL_OK;
  if (tokens < 0 || !x || !signs || !sizes || !columns || !y || width < 1 || factors < 1)
    return refuse(NOMUL_BAD_ARGUMENT, "a pointer is null, or there are no tokens, channels or factors");
  int64_t order = 1;
  for (int64_t f = 0; f < factors; f++) {
    if (!columns[f] || sizes[f] < 1 || sizes[f] > width) return refuse(NOMUL_BAD_ARGUMENT, "a factor cannot have order %lld", sizes[f]);
    order *= sizes[f];
    if (order > width) break;
  }
  if (order > width || width % order)
    return refuse(NOMUL_BAD_ARGUMENT, "blocks of %lld do not divide %lld channels", order, width);
  static thread_local std::vector<float> spare;
  try {
    if ((int64_t)spare.size() < width) spare.resize(width);
  } catch (const std::exception&) {
    return refuse(NOMUL_BAD_ARGUMENT, "there is no memory for %lld channels", width);
  }
  for (int64_t t = 0; t < tokens; t++)
    chosen().load()->hadamard(x + t * width, signs, signs_last, width, factors, sizes, columns, y + t * width,
                              spare.data());
  return NOMUL_OK;
}

const char* nomul_level(void) {
  const nomul_kernels* k = chosen().load();
  return k ? k->name : "";
}

const char* nomul_levels(void) {
  static const std::string names = [] {
    std::string all;
    for (const nomul_kernels* k : runnable()) all += (all.empty() ? "" : ",") + std::string(k->name);
    return all;
  }();
  return names.c_str();
}

int nomul_set_level(const char* name) {
  const nomul_kernels* k = name ? named(name) : nullptr;
  if (!k) {
    std::snprintf(reason, sizeof reason, "there is no level %s on this CPU, which runs %s", name ? name : "(null)",
                  nomul_levels());
    return NOMUL_NO_SUCH_LEVEL;
  }
  chosen() = k;
  return NOMUL_OK;
}

const char* nomul_error(void) { return reason; }

int32_t nomul_version(void) { return NOMUL_LAYOUT_VERSION; }

}  // extern "C"
