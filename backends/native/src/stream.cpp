// Reading memory as fast as it comes: what the speed of the row kernels is held against.
#include <algorithm>
#include <cstring>
#include <thread>
#include <vector>

#include "nomul.h"

namespace {

// Eight loads of 64 bytes at a time; the compiler splits them where registers are narrower.
typedef uint64_t Vector __attribute__((vector_size(64)));
constexpr int kLoads = 8;
constexpr int64_t kPage = 4096, kLine = sizeof(Vector);

// Take `pages` pages together, one line of each after another: the processor fetches ahead within each of them, which
// is how memory gives all it can; one page at a time leaves it waiting at every page's end.
template <int pages>
__attribute__((always_inline)) inline uint64_t sum_of(const uint8_t* data, int64_t bytes) {
  constexpr int lines = kLoads / pages;
  Vector totals[kLoads] = {};
  int64_t start = 0;
  for (; start + pages * kPage <= bytes; start += pages * kPage)
    for (int64_t at = 0; at < kPage; at += lines * kLine)
      for (int i = 0; i < kLoads; i++) {
        Vector v;
        std::memcpy(&v, data + start + i / lines * kPage + at + i % lines * kLine, sizeof v);
        totals[i] += v;
      }
  for (; start + kLoads * kLine <= bytes; start += kLoads * kLine)
    for (int i = 0; i < kLoads; i++) {
      Vector v;
      std::memcpy(&v, data + start + i * kLine, sizeof v);
      totals[i] += v;
    }
  uint64_t sum = 0;
  for (int i = 0; i < kLoads; i++)
    for (int j = 0; j < 8; j++) sum += totals[i][j];
  for (; start < bytes; start++) sum += data[start];
  return sum;
}

using Sum = uint64_t (*)(const uint8_t*, int64_t);

template <int pages>
uint64_t plain_sum(const uint8_t* data, int64_t bytes) {
  return sum_of<pages>(data, bytes);
}

#if defined(__x86_64__)
template <int pages>
__attribute__((target("avx2"))) uint64_t avx2_sum(const uint8_t* data, int64_t bytes) {
  return sum_of<pages>(data, bytes);
}
template <int pages>
__attribute__((target("avx512f"))) uint64_t avx512_sum(const uint8_t* data, int64_t bytes) {
  return sum_of<pages>(data, bytes);
}
#endif

// The widest loads of this CPU, whatever level of the kernels is forced.
template <int pages>
Sum widest() {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512f")) return &avx512_sum<pages>;
  if (__builtin_cpu_supports("avx2")) return &avx2_sum<pages>;
#endif
  return &plain_sum<pages>;
}

}  // namespace

extern "C" uint64_t nomul_stream(const void* data, int64_t bytes, int64_t times, int32_t threads, int32_t in_order) {
  const Sum sum = in_order ? widest<1>() : widest<kLoads>();
  const int64_t count = std::max<int64_t>(1, threads), part = (bytes / count + 63) / 64 * 64;
  std::vector<uint64_t> sums(count, 0);
  const auto work = [&](int64_t i) {
    const int64_t first = std::min(bytes, i * part), last = i + 1 < count ? std::min(bytes, first + part) : bytes;
    uint64_t mine = 0;
    for (int64_t t = 0; t < times; t++) {
      mine += sum((const uint8_t*)data + first, last - first);
      // Else a compiler may read once and multiply.
      asm volatile("" ::: "memory");
    }
    sums[i] = mine;
  };
  std::vector<std::thread> others;
  for (int64_t i = 1; i < count; i++) others.emplace_back(work, i);
  work(0);
  for (std::thread& other : others) other.join();
  uint64_t total = 0;
  for (uint64_t s : sums) total += s;
  return total;
}
