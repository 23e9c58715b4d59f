// C interface of the shift-add kernels: weights in tile order (see layout.h), float activations in, float results out.
//
// All functions may be called from several threads at once. Those that return int give 0, or a NOMUL_* code with the
// reason in nomul_error(), which is of the calling thread.
#pragma once

#include <stddef.h>
#include <stdint.h>

#if defined(_WIN32)
#define NOMUL_API __declspec(dllexport)
#else
#define NOMUL_API __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif

enum { NOMUL_LAYOUT_VERSION = 1 };

enum { NOMUL_OK = 0, NOMUL_BAD_LAYOUT = 1, NOMUL_BAD_ARGUMENT = 2, NOMUL_NO_SUCH_LEVEL = 3, NOMUL_NO_MEMORY = 4 };

// How activations enter: as float; as sums of four of 16 bits, so that they keep 14 (many tokens: each of 16 bits); or
// as sums of four of 8 bits (many tokens: each of 8 bits). What a level has no faster way for it takes as float,
// and what would be rounded too coarsely: sums of more than five planes cancel each other for the most part.
enum { NOMUL_EXACT = 0, NOMUL_14_BIT = 1, NOMUL_8_BIT = 2 };

// What stands beside the scales of a group: nothing, an offset coded as they are, or a zero point of uniform codes.
enum { NOMUL_NO_OFFSET = 0, NOMUL_OFFSET = 1, NOMUL_ZERO_POINT = 2 };

// A weight [rows, inputs] of sign planes. tied: one scale a group, plane i being worth 2^(i-1) of it (uniform codes);
// terms: powers of two a scale, 1 to 4, or 0 for float16.
typedef struct {
  int32_t version, planes, group, terms, tied, offset;
  int64_t rows, inputs;
} nomul_layout;

// Bytes of a weight in tile order; -1 for a layout that cannot be.
NOMUL_API int64_t nomul_weight_bytes(const nomul_layout* layout);

// Bytes of scratch that `nomul_prepare` fills for `tokens` tokens; may be 0.
NOMUL_API int64_t nomul_scratch_bytes(const nomul_layout* layout, int64_t tokens, int32_t mode);

// Turn activations x [tokens, inputs] into what the row kernels look up or multiply; scratch is 64-byte aligned.
NOMUL_API int nomul_prepare(const nomul_layout* layout, int32_t mode, const float* x, int64_t tokens, void* scratch);

// Compute y[t, first_row..last_row) of y [tokens, rows] from the activations and the scratch prepared from them;
// first_row is a multiple of 32. bias: float [rows] or null.
NOMUL_API int nomul_rows(const nomul_layout* layout, int32_t mode, const uint8_t* weight, const float* bias,
                         const float* x, const void* scratch, int64_t tokens, int64_t first_row, int64_t last_row,
                         float* y);

// Compute y [tokens, rows] = x W^T + bias on `threads` threads.
NOMUL_API int nomul_linear(const nomul_layout* layout, int32_t mode, const uint8_t* weight, int64_t weight_bytes,
                           const float* bias, const float* x, int64_t tokens, float* y, int32_t threads);

// The same three steps, and all at once, for a weight [rows, inputs] of 16-bit floats or of int8, row after row. Those of
// int8 are multiplied with scales: float16 [rows, inputs / NOMUL_BLOCK], one for so many inputs.
enum { NOMUL_BFLOAT16 = 0, NOMUL_FLOAT16 = 1, NOMUL_INT8 = 2 };
enum { NOMUL_BLOCK = 32 };

typedef struct {
  int32_t kind;
  int64_t rows, inputs;
  const void* scales;
} nomul_dense;

NOMUL_API int64_t nomul_dense_scratch_bytes(const nomul_dense* dense, int64_t tokens, int32_t mode);
NOMUL_API int nomul_dense_prepare(const nomul_dense* dense, int32_t mode, const float* x, int64_t tokens, void* scratch);
NOMUL_API int nomul_dense_rows(const nomul_dense* dense, int32_t mode, const uint8_t* weight, const float* bias,
                               const float* x, const void* scratch, int64_t tokens, int64_t first_row, int64_t last_row,
                               float* y);
NOMUL_API int nomul_dense_linear(const nomul_dense* dense, int32_t mode, const uint8_t* weight, int64_t weight_bytes,
                                 const float* bias, const float* x, int64_t tokens, float* y, int32_t threads);

// Decode rows [first_row, last_row) to float [rows, inputs]; first_row is a multiple of 32.
NOMUL_API int nomul_decode(const nomul_layout* layout, const uint8_t* weight, int64_t first_row, int64_t last_row,
                           float* out);

// Turn each token of x [tokens, width] by y = H D x, or D H^T x where signs_last is set. H acts on each block of
// prod(sizes) channels as the Kronecker product of `factors` matrices; columns[f] is factor f by columns, [size, size];
// signs: float [width], the diagonal D.
NOMUL_API int nomul_hadamard(const float* x, int64_t tokens, int64_t width, const float* signs, int32_t signs_last,
                             int64_t factors, const int64_t* sizes, const float* const* columns, float* y);

// Read `bytes` bytes `times` times, each of `threads` threads its part; what is returned depends on all of them.
// in_order: from the first to the last byte; else eight pages at once, which is faster where caches do not hold them.
NOMUL_API uint64_t nomul_stream(const void* data, int64_t bytes, int64_t times, int32_t threads, int32_t in_order);

// The level in use (`portable`, `avx2`, `avx512`, `amx`), the levels this CPU can run, comma separated; choose one,
// while no other thread computes: what a level prepares only that level reads.
NOMUL_API const char* nomul_level(void);
NOMUL_API const char* nomul_levels(void);
NOMUL_API int nomul_set_level(const char* name);

NOMUL_API const char* nomul_error(void);
NOMUL_API int32_t nomul_version(void);

#ifdef __cplusplus
}
#endif
