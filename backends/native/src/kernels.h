// What each level offers to the dispatcher; the C interface says what each function does.
#pragma once

#include "nomul.h"

// What to compute of y [tokens, rows]: rows [first_row, last_row), first_row being a multiple of 32. Form says how the
// weight is stored: nomul_layout or nomul_dense.
template <class Form>
struct nomul_job {
  const Form& form;
  int32_t mode;
  const uint8_t* weight;
  const float *bias, *x;
  const void* scratch;
  int64_t tokens, first_row, last_row;
  float* y;
};

template <class Form>
struct nomul_product {
  int64_t (*scratch_bytes)(const Form&, int64_t tokens, int32_t mode);
  void (*prepare)(const Form&, int32_t mode, const float* x, int64_t tokens, void* scratch);
  // Bytes that each thread needs for itself while it computes rows.
  int64_t (*spare_bytes)(const Form&, int64_t tokens, int32_t mode);
  void (*rows)(const nomul_job<Form>&, void* spare);
};

struct nomul_kernels {
  const char* name;
  nomul_product<nomul_layout> tiled;
  nomul_product<nomul_dense> dense;
  void (*hadamard)(const float* x, const float* signs, int signs_last, int64_t width, int64_t factors,
                   const int64_t* sizes, const float* const* columns, float* y, float* spare);
  void (*decode)(const nomul_layout&, const uint8_t* weight, int64_t first_row, int64_t last_row, float* out);
};

const nomul_kernels* nomul_portable_kernels();
const nomul_kernels* nomul_avx2_kernels();
const nomul_kernels* nomul_avx512_kernels();
const nomul_kernels* nomul_amx_kernels();
