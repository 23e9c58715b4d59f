// Many threads in the kernels at once, for a build with -fsanitize=thread (`make test-native`): every thread must find
// what one thread alone found before, and what a float64 loop gives.
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "nomul.h"

namespace {

struct Problem {
  nomul_layout layout;
  int32_t mode, threads;
  int64_t tokens;
  std::vector<uint8_t> weight;
  std::vector<float> x, bias, wanted;
};

std::vector<float> numbers(std::mt19937& random, int64_t count) {
  std::normal_distribution<float> normal;
  std::vector<float> made(count);
  for (float& value : made) value = normal(random);
  return made;
}

// Any bytes are a weight, but exponents of rows are kept small, so that results are finite: with terms they come first
// in a tile, and without terms all bytes of the head are those of halves, which are kept below 2.
std::vector<uint8_t> random_weight(std::mt19937& random, const nomul_layout& l) {
  std::vector<uint8_t> made(nomul_weight_bytes(&l));
  for (uint8_t& byte : made) byte = (uint8_t)random();
  const int64_t tiles = (l.rows + 31) / 32, tile = (int64_t)made.size() / tiles;
  for (int64_t t = 0; t < tiles; t++)
    for (int64_t i = 0; i < (l.terms ? 64 : tile); i++) {
      uint8_t& byte = made[t * tile + i];
      byte = l.terms ? byte % 5 : i % 2 ? byte & 0xBF : byte;
    }
  return made;
}

bool fails(int code, const char* what) {
  if (code) std::printf("%s: %s\n", what, nomul_error());
  return code != 0;
}

bool run(const Problem& p, std::vector<float>& y) {
  y.assign(p.tokens * p.layout.rows, 0.0f);
  return !fails(nomul_linear(&p.layout, p.mode, p.weight.data(), (int64_t)p.weight.size(), p.bias.data(), p.x.data(),
                             p.tokens, y.data(), p.threads),
                "nomul_linear");
}

// The distance from a float64 loop over the decoded weight, relative to the size of the terms of its sums: a single
// result may be as small as chance has it.
double distance(const Problem& p) {
  const nomul_layout& l = p.layout;
  std::vector<float> weight(l.rows * l.inputs);
  if (fails(nomul_decode(&l, p.weight.data(), 0, l.rows, weight.data()), "nomul_decode")) return INFINITY;
  double off = 0, size = 0;
  for (int64_t t = 0; t < p.tokens; t++)
    for (int64_t r = 0; r < l.rows; r++) {
      double sum = p.bias[r];
      for (int64_t k = 0; k < l.inputs; k++) {
        const double term = (double)weight[r * l.inputs + k] * p.x[t * l.inputs + k];
        sum += term, size += term * term;
      }
      const double d = p.wanted[t * l.rows + r] - sum;
      off += d * d;
    }
  return std::sqrt(off / size);
}

std::vector<Problem> problems() {
  std::mt19937 random(1);
  std::vector<Problem> made;
  int index = 0;
  for (int64_t rows : {1, 33, 600})
    for (int planes : {1, 3, 8})
      for (int64_t tokens : {1, 5, 14}) {
        const bool tied = index % 4 == 3;
        const int offset = index % 2 ? (tied ? NOMUL_ZERO_POINT : NOMUL_OFFSET) : NOMUL_NO_OFFSET;
        Problem p = {{NOMUL_LAYOUT_VERSION, planes, 40, index % 5, tied, offset, rows, 100}, (index + index / 3) % 3, 1 + index % 3,
                     tokens, {}, numbers(random, tokens * 100), numbers(random, rows), {}};
        p.weight = random_weight(random, p.layout);
        made.push_back(std::move(p));
        index++;
      }
  return made;
}

bool hadamard_agrees() {
  const std::vector<float> x(96, 1.0f), signs(96, 1.0f), columns = {1, 1, 1, -1};
  const int64_t sizes[] = {2, 2};
  const float* factors[] = {columns.data(), columns.data()};
  std::vector<float> y(96);
  if (fails(nomul_hadamard(x.data(), 1, 96, signs.data(), 0, 2, sizes, factors, y.data()), "nomul_hadamard")) return false;
  for (int i = 0; i < 96; i++)
    if (y[i] != (i % 4 ? 0.0f : 4.0f)) return false;
  return true;
}

bool all_agree(const std::vector<Problem>& list, int first) {
  bool agree = true;
  std::vector<float> y;
  for (size_t i = 0; i < list.size(); i++) {
    const Problem& p = list[(i + first) % list.size()];
    agree = agree && run(p, y) && std::memcmp(y.data(), p.wanted.data(), y.size() * 4) == 0;
    agree = agree && nomul_linear(&p.layout, 9, nullptr, 0, nullptr, nullptr, 1, nullptr, 1) == NOMUL_BAD_ARGUMENT &&
            std::string(nomul_error()) == "there is no mode 9" && hadamard_agrees();
  }
  return agree;
}

}  // namespace

int main() {
  const double bounds[] = {1e-6, 5e-4, 2e-2};
  std::string names = nomul_levels();
  bool good = true;
  for (size_t start = 0; start < names.size();) {
    const size_t end = std::min(names.find(',', start), names.size());
    const std::string level = names.substr(start, end - start);
    start = end + 1;
    good = !fails(nomul_set_level(level.c_str()), "nomul_set_level") && good;
    std::vector<Problem> list = problems();
    double worst[3] = {};
    for (Problem& p : list) {
      good = run(p, p.wanted) && good;
      worst[p.mode] = std::max(worst[p.mode], distance(p));
    }
    for (int mode = 0; mode < 3; mode++) good = worst[mode] <= bounds[mode] && good;
    std::vector<std::thread> threads;
    std::vector<char> agree(6);
    for (int i = 0; i < 6; i++) threads.emplace_back([&, i] { agree[i] = all_agree(list, 5 * i); });
    for (std::thread& thread : threads) thread.join();
    for (char one : agree) good = one && good;
    std::printf("%s: %zu products, relative errors %.1e %.1e %.1e: %s\n", level.c_str(), list.size(), worst[0],
                worst[1], worst[2], good ? "all threads agree" : "FAILED");
  }
  return good ? 0 : 1;
}
