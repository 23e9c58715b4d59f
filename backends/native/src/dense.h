// Weights of 16-bit floats or int8, row after row: few tokens by one pass over the rows, many by columns.
#pragma once

#include "gemm.h"
#include "stored.h"

namespace NOMUL_NAMESPACE {

// y[m, r] = x[m] . w[r] + bias[r] for R rows that follow each other and M tokens.
template <int Kind, int R, int M>
static void dot_rows(const nomul_job<nomul_dense>& job, int64_t row, int64_t token) {
  const nomul_dense& d = job.form;
  const float* x = job.x + token * d.inputs;
  Floats sum[R][M];
#pragma GCC unroll 8
  for (int r = 0; r < R; r++)
#pragma GCC unroll 8
    for (int m = 0; m < M; m++) sum[r][m] = zeros();
  const auto add = [&](int64_t k, int count) {
    Floats a[M];
#pragma GCC unroll 8
    for (int m = 0; m < M; m++)
      a[m] = count == kLanes ? load(x + m * d.inputs + k) : load_some(x + m * d.inputs + k, count);
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) {
      // The rows that come next: the CPU sees each of them as a stream too short to follow.
      prefetch(job.weight + ((row + r + R) * d.inputs + k) * kBytes<Kind>);
      const Floats v = weights_at<Kind>(d, job.weight, row + r, k, count);
#pragma GCC unroll 8
      for (int m = 0; m < M; m++) sum[r][m] = fma(v, a[m], sum[r][m]);
    }
  };
  int64_t k = 0;
  for (; k + kLanes <= d.inputs; k += kLanes) add(k, kLanes);
  if (k < d.inputs) add(k, (int)(d.inputs - k));
  for (int r = 0; r < R; r++)
    for (int m = 0; m < M; m++)
      job.y[(token + m) * job.form.rows + row + r] = sum_of(sum[r][m]) + (job.bias ? job.bias[row + r] : 0.0f);
}

template <int Kind, int R>
static void dot_tokens(const nomul_job<nomul_dense>& job, int64_t row) {
  int64_t token = 0;
  for (; token + 3 <= job.tokens; token += 3) dot_rows<Kind, R, 3>(job, row, token);
  for (; token < job.tokens; token++) dot_rows<Kind, R, 1>(job, row, token);
}

template <int Kind>
static void few_dense_rows(const nomul_job<nomul_dense>& job) {
  int64_t row = job.first_row;
  for (; row + 4 <= job.last_row; row += 4) dot_tokens<Kind, 4>(job, row);
  for (; row < job.last_row; row++) dot_tokens<Kind, 1>(job, row);
}

template <int Kind>
static void dense_columns(const nomul_job<nomul_dense>& job, int64_t row, float* w) {
  const int64_t inputs = job.form.inputs, rows = job.last_row - row;
  for (int64_t first = 0; first < kRows; first += kLanes)
    for (int64_t k = 0; k < inputs; k += kLanes) {
      const int count = (int)(inputs - k < kLanes ? inputs - k : kLanes);
      alignas(64) float block[kLanes][kLanes];
      for (int r = 0; r < kLanes; r++) {
        const int64_t at = row + first + r;
        store(block[r], first + r < rows ? weights_at<Kind>(job.form, job.weight, at, k, count) : zeros(), kLanes);
      }
      for (int i = 0; i < count; i++)
        for (int r = 0; r < kLanes; r++) w[(k + i) * kRows + first + r] = block[r][i];
    }
}

// Tokens from which turning rows into columns is faster.
constexpr int64_t kManyDense = 25;

static int64_t dense_scratch_bytes(const nomul_dense& d, int64_t tokens, int32_t) {
  return tokens < kManyDense ? 0 : float_scratch_bytes(d.inputs, tokens);
}

static void dense_prepare(const nomul_dense& d, int32_t, const float* x, int64_t tokens, void* scratch) {
  if (tokens >= kManyDense) pack_tokens(d.inputs, x, tokens, (float*)scratch);
}

static int64_t dense_spare_bytes(const nomul_dense& d, int64_t tokens, int32_t) {
  return tokens < kManyDense ? 0 : float_spare_bytes(d.inputs);
}

template <int Kind>
static void dense_rows_of(const nomul_job<nomul_dense>& job, void* spare) {
  if (job.tokens < kManyDense) few_dense_rows<Kind>(job);
  else float_rows(job, (float*)spare, [&](int64_t row, float* w) { dense_columns<Kind>(job, row, w); });
}

static void dense_rows(const nomul_job<nomul_dense>& job, void* spare) {
  switch (job.form.kind) {
    case NOMUL_FLOAT16: return dense_rows_of<NOMUL_FLOAT16>(job, spare);
    case NOMUL_INT8: return dense_rows_of<NOMUL_INT8>(job, spare);
    default: return dense_rows_of<NOMUL_BFLOAT16>(job, spare);
  }
}

constexpr nomul_product<nomul_dense> kDense = {dense_scratch_bytes, dense_prepare, dense_spare_bytes, dense_rows};

}  // namespace NOMUL_NAMESPACE
