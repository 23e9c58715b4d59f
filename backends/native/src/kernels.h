// What each level offers to the dispatcher; the C interface says what each function does.
#pragma once

#include "nomul.h"

// What to compute of y [tokens, rows]: rows [first_row, last_row), first_row being a multiple of 32.
struct nomul_job {
  const nomul_layout& layout;
  int32_t mode;
  const uint8_t* weight;
  const float *bias, *x;
  const void* scratch;
  int64_t tokens, first_row, last_row;
  float* y;
};

struct nomul_kernels {
  const char* name;
  int64_t (*scratch_bytes)(const nomul_layout&, int64_t tokens, int32_t mode);
  void (*prepare)(const nomul_layout&, int32_t mode, const float* x, int64_t tokens, void* scratch);
  // Bytes that each thread needs for itself while it computes rows.
  int64_t (*spare_bytes)(const nomul_layout&, int64_t tokens, int32_t mode);
  void (*rows)(const nomul_job&, void* spare);
  void (*hadamard)(const float* x, const float* signs, int signs_last, int64_t width, int64_t factors,
                   const int64_t* sizes, const float* const* columns, float* y, float* spare);
  void (*decode)(const nomul_layout&, const uint8_t* weight, int64_t first_row, int64_t last_row, float* out);
};

const nomul_kernels* nomul_portable_kernels();
const nomul_kernels* nomul_avx2_kernels();
const nomul_kernels* nomul_avx512_kernels();
const nomul_kernels* nomul_amx_kernels();
