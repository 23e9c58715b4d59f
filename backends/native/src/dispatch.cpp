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

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

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

#if defined(__x86_64__) && defined(__linux__)
// Tiles of int8: the CPU must have them, the system must save them, and this process must ask for them once.
bool has_amx() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (!has_avx512() || !__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d >> 24 & 1) || !(d >> 25 & 1)) return false;
  constexpr int kAskForTiles = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kAskForTiles, kTileData) == 0;
}
#else
bool has_amx() { return false; }
#endif

// From the slowest to the fastest that this CPU runs.
const std::vector<const nomul_kernels*>& runnable() {
  static const std::vector<const nomul_kernels*> found = [] {
    std::vector<const nomul_kernels*> list = {nomul_portable_kernels()};
#if defined(__x86_64__)
    if (has_avx2()) list.push_back(nomul_avx2_kernels());
    if (has_avx512()) list.push_back(nomul_avx512_kernels());
    if (has_amx()) list.push_back(nomul_amx_kernels());
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

int check(const nomul_dense* d) {
  if (!d) return refuse(NOMUL_BAD_LAYOUT, "no form of the weight was given");
  if (d->rows < 1 || d->inputs < 1 || d->rows > INT32_MAX || d->inputs > INT32_MAX)
    return refuse(NOMUL_BAD_LAYOUT, "a weight cannot be %lld x %lld", d->rows, d->inputs);
  if (d->kind < NOMUL_BFLOAT16 || d->kind > NOMUL_INT8)
    return refuse(NOMUL_BAD_LAYOUT, "there are no weights of kind %lld", d->kind);
  if (d->kind == NOMUL_INT8 && !d->scales) return refuse(NOMUL_BAD_LAYOUT, "weights of int8 need scales");
  return NOMUL_OK;
}

int64_t chunks_of(const nomul_layout& l) { return nomul_plain::shape_of(l).chunks; }
int64_t chunks_of(const nomul_dense& d) { return nomul_plain::over(d.inputs, nomul_plain::kChunk); }

template <class Form>
int check(const Form* form, int32_t mode, int64_t tokens) {
  if (const int code = check(form)) return code;
  if (!chosen().load()) return no_level();
  if (mode < NOMUL_EXACT || mode > NOMUL_8_BIT) return refuse(NOMUL_BAD_ARGUMENT, "there is no mode %lld", mode);
  // What a token takes for a chunk is at most half of these 1024 bytes; tokens are filled up to tiles of 16.
  if (tokens < 0 || tokens > kMost / (1024 * chunks_of(*form)))
    return refuse(NOMUL_BAD_ARGUMENT, "there cannot be %lld tokens", tokens);
  return NOMUL_OK;
}

template <class Form>
int check_rows(const Form* form, int64_t first_row, int64_t last_row) {
  if (first_row % 32 || first_row < 0 || last_row > form->rows || first_row > last_row)
    return refuse(NOMUL_BAD_ARGUMENT, "rows %lld to %lld cannot be computed by themselves", first_row, last_row);
  return NOMUL_OK;
}

int null_pointer() { return refuse(NOMUL_BAD_ARGUMENT, "a pointer is null"); }

// Memory at a multiple of 64 bytes that grows when more is asked for; what it held is then lost.
struct Memory {
  struct Free {
    void operator()(void* p) const { std::free(p); }
  };
  std::unique_ptr<void, Free> bytes;
  int64_t size = 0;

  bool at_least(int64_t wanted) {
    wanted = std::max<int64_t>(64, (wanted + 63) / 64 * 64);
    if (size < wanted) {
      bytes.reset(std::aligned_alloc(64, (size_t)wanted));
      size = bytes ? wanted : 0;
    }
    return size >= wanted;
  }
};

// Rows of a piece of work: enough that a thread's start does not count.
constexpr int64_t kPiece = 256;

int64_t bytes_of(const nomul_layout& l) { return nomul_weight_bytes(&l); }
int64_t bytes_of(const nomul_dense& d) { return d.rows * d.inputs * (d.kind == NOMUL_INT8 ? 1 : 2); }

const nomul_product<nomul_layout>& product_of(const nomul_layout&) { return chosen().load()->tiled; }
const nomul_product<nomul_dense>& product_of(const nomul_dense&) { return chosen().load()->dense; }

template <class Form>
int64_t scratch_bytes(const Form* form, int64_t tokens, int32_t mode) {
  return check(form, mode, tokens) ? -1 : product_of(*form).scratch_bytes(*form, tokens, mode);
}

template <class Form>
int prepare(const Form* form, int32_t mode, const float* x, int64_t tokens, void* scratch) {
  if (const int code = check(form, mode, tokens)) return code;
  if (!x || !scratch || (uintptr_t)scratch % 64)
    return refuse(NOMUL_BAD_ARGUMENT, "activations and a scratch at a multiple of 64 bytes are needed");
  product_of(*form).prepare(*form, mode, x, tokens, scratch);
  return NOMUL_OK;
}

template <class Form>
int rows(const Form* form, int32_t mode, const uint8_t* weight, const float* bias, const float* x, const void* scratch,
         int64_t tokens, int64_t first_row, int64_t last_row, float* y) {
  if (const int code = check(form, mode, tokens)) return code;
  if (const int code = check_rows(form, first_row, last_row)) return code;
  if (!weight || !x || !y || !scratch) return null_pointer();
  if ((uintptr_t)scratch % 64) return refuse(NOMUL_BAD_ARGUMENT, "a scratch at a multiple of 64 bytes is needed");
  if (first_row == last_row || tokens == 0) return NOMUL_OK;
  const nomul_product<Form>& product = product_of(*form);
  const int64_t bytes = product.spare_bytes(*form, tokens, mode);
  static thread_local Memory spare;
  if (!spare.at_least(bytes)) return refuse(NOMUL_NO_MEMORY, "a thread cannot have %lld bytes for itself", bytes);
  product.rows({*form, mode, weight, bias, x, scratch, tokens, first_row, last_row, y}, spare.bytes.get());
  return NOMUL_OK;
}

template <class Form>
int linear(const Form* form, int32_t mode, const uint8_t* weight, int64_t weight_bytes, const float* bias,
           const float* x, int64_t tokens, float* y, int32_t threads) {
  if (const int code = check(form, mode, tokens)) return code;
  if (tokens == 0) return NOMUL_OK;
  if (!weight || !y || !x) return null_pointer();
  if (weight_bytes != bytes_of(*form))
    return refuse(NOMUL_BAD_ARGUMENT, "the weight has %lld bytes, its layout needs %lld", weight_bytes, bytes_of(*form));
  if (threads < 1) return refuse(NOMUL_BAD_ARGUMENT, "there cannot be %lld threads", threads);
  const int64_t bytes = product_of(*form).scratch_bytes(*form, tokens, mode);
  Memory scratch;
  if (!scratch.at_least(bytes)) return refuse(NOMUL_NO_MEMORY, "%lld bytes of scratch cannot be had", bytes);
  product_of(*form).prepare(*form, mode, x, tokens, scratch.bytes.get());
  const int64_t pieces = (form->rows + kPiece - 1) / kPiece;
  std::atomic<int64_t> next{0};
  std::atomic<int> failed{0};
  const auto work = [&] {
    for (int64_t i; (i = next++) < pieces;) {
      const int64_t first = i * kPiece, last = std::min(form->rows, first + kPiece);
      const int code = rows(form, mode, weight, bias, x, scratch.bytes.get(), tokens, first, last, y);
      if (code) failed = code;
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
  return failed ? refuse(failed, "a thread has no memory of its own for %lld tokens", tokens) : NOMUL_OK;
}

}  // namespace

extern "C" {

int64_t nomul_weight_bytes(const nomul_layout* l) {
  if (check(l)) return -1;
  const nomul_plain::Shape s = nomul_plain::shape_of(*l);
  return s.tiles * s.tile_bytes;
}

int64_t nomul_scratch_bytes(const nomul_layout* l, int64_t tokens, int32_t mode) { return scratch_bytes(l, tokens, mode); }

int nomul_prepare(const nomul_layout* l, int32_t mode, const float* x, int64_t tokens, void* scratch) {
  return prepare(l, mode, x, tokens, scratch);
}

int nomul_rows(const nomul_layout* l, int32_t mode, const uint8_t* weight, const float* bias, const float* x,
               const void* scratch, int64_t tokens, int64_t first_row, int64_t last_row, float* y) {
  return rows(l, mode, weight, bias, x, scratch, tokens, first_row, last_row, y);
}

int nomul_linear(const nomul_layout* l, int32_t mode, const uint8_t* weight, int64_t weight_bytes, const float* bias,
                 const float* x, int64_t tokens, float* y, int32_t threads) {
  return linear(l, mode, weight, weight_bytes, bias, x, tokens, y, threads);
}

int64_t nomul_dense_scratch_bytes(const nomul_dense* d, int64_t tokens, int32_t mode) {
  return scratch_bytes(d, tokens, mode);
}

int nomul_dense_prepare(const nomul_dense* d, int32_t mode, const float* x, int64_t tokens, void* scratch) {
  return prepare(d, mode, x, tokens, scratch);
}

int nomul_dense_rows(const nomul_dense* d, int32_t mode, const uint8_t* weight, const float* bias, const float* x,
                     const void* scratch, int64_t tokens, int64_t first_row, int64_t last_row, float* y) {
  return rows(d, mode, weight, bias, x, scratch, tokens, first_row, last_row, y);
}

int nomul_dense_linear(const nomul_dense* d, int32_t mode, const uint8_t* weight, int64_t weight_bytes,
                       const float* bias, const float* x, int64_t tokens, float* y, int32_t threads) {
  return linear(d, mode, weight, weight_bytes, bias, x, tokens, y, threads);
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
    if (!columns[f] || sizes[f] < 1 || sizes[f] > width)
      return refuse(NOMUL_BAD_ARGUMENT, "a factor cannot have order %lld", sizes[f]);
    order *= sizes[f];
    if (order > width) break;
  }
  if (order > width || width % order)
    return refuse(NOMUL_BAD_ARGUMENT, "blocks of %lld do not divide %lld channels", order, width);
  static thread_local std::vector<float> spare;
  try {
    if ((int64_t)spare.size() < width) spare.resize(width);
  } catch (const std::exception&) {
    return refuse(NOMUL_NO_MEMORY, "there is no memory for %lld channels", width);
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
