// ONNX Runtime's side: the operators of the domain `nomul`, on the runtime's threads.
#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "nomul.h"
#include "ort_abi.h"

namespace {

using ort::call;
using ort::CustomOp;
using ort::Table;

struct Tensor {
  void* data = nullptr;
  int type = 0;
  std::vector<int64_t> dims;
  int64_t count = 0;
};

OrtStatus* failure(Table api, const std::string& why, int code = ort::kInvalidArgument) {
  return call<OrtStatus*>(api, ort::CreateStatus, code, why.c_str());
}

// Read what a value holds; the runtime's own status if it cannot be.
OrtStatus* read(Table api, const OrtValue* value, Tensor& out) {
  OrtTensorTypeAndShapeInfo* info = nullptr;
  if (OrtStatus* s = call<OrtStatus*>(api, ort::GetTensorTypeAndShape, value, &info)) return s;
  size_t rank = 0, count = 0;
  OrtStatus* s = call<OrtStatus*>(api, ort::GetDimensionsCount, (const OrtTensorTypeAndShapeInfo*)info, &rank);
  out.dims.resize(rank);
  if (!s) s = call<OrtStatus*>(api, ort::GetDimensions, (const OrtTensorTypeAndShapeInfo*)info, out.dims.data(), rank);
  if (!s) s = call<OrtStatus*>(api, ort::GetTensorShapeElementCount, (const OrtTensorTypeAndShapeInfo*)info, &count);
  if (!s) s = call<OrtStatus*>(api, ort::GetTensorElementType, (const OrtTensorTypeAndShapeInfo*)info, &out.type);
  if (!s) s = call<OrtStatus*>(api, ort::GetTensorMutableData, const_cast<OrtValue*>(value), &out.data);
  call<void>(api, ort::ReleaseTensorTypeAndShapeInfo, info);
  out.count = (int64_t)count;
  return s;
}

OrtStatus* integer(Table api, const OrtKernelInfo* info, const char* name, int64_t& out) {
  return call<OrtStatus*>(api, ort::KernelInfoGetAttribute_int64, info, name, &out);
}

// Several integers; none where the attribute is left out.
OrtStatus* integers(Table api, const OrtKernelInfo* info, const char* name, std::vector<int64_t>& out) {
  size_t count = 0;
  if (OrtStatus* s =
          call<OrtStatus*>(api, ort::KernelInfoGetAttributeArray_int64, info, name, (int64_t*)nullptr, &count)) {
    call<void>(api, ort::ReleaseStatus, s);
    return nullptr;
  }
  out.resize(count);
  return call<OrtStatus*>(api, ort::KernelInfoGetAttributeArray_int64, info, name, out.data(), &count);
}

// A constant input of a node; its data is the session's own and lives as long.
OrtStatus* constant(Table api, const OrtKernelInfo* info, size_t index, const char* what, int type, Tensor& out) {
  int is_constant = 0;
  const OrtValue* value = nullptr;
  if (OrtStatus* s = call<OrtStatus*>(api, ort::KernelInfoGetConstantInput_tensor, info, index, &is_constant, &value))
    return s;
  if (!is_constant || !value) return failure(api, std::string(what) + " must be a constant of the model");
  if (OrtStatus* s = read(api, value, out)) return s;
  if (type != ort::kAny && out.type != type)
    return failure(api, std::string(what) + " has another element type than it must have");
  return nullptr;
}

OrtStatus* input(Table api, OrtKernelContext* context, size_t index, Tensor& out) {
  const OrtValue* value = nullptr;
  if (OrtStatus* s =
          call<OrtStatus*>(api, ort::KernelContext_GetInput, (const OrtKernelContext*)context, index, &value))
    return s;
  out = Tensor();
  return value ? read(api, value, out) : nullptr;
}

OrtStatus* output(Table api, OrtKernelContext* context, size_t index, const std::vector<int64_t>& dims, float** data) {
  OrtValue* value = nullptr;
  if (OrtStatus* s =
          call<OrtStatus*>(api, ort::KernelContext_GetOutput, context, index, dims.data(), dims.size(), &value))
    return s;
  if (!value) return failure(api, "the node has no output " + std::to_string(index));
  return call<OrtStatus*>(api, ort::GetTensorMutableData, value, (void**)data);
}

// Scratch of a thread, grown when needed, at multiples of 64 bytes.
void* scratch_of(int64_t bytes) {
  struct Free {
    void operator()(void* p) const { std::free(p); }
  };
  static thread_local std::unique_ptr<void, Free> held;
  static thread_local int64_t size = 0;
  bytes = std::max<int64_t>(bytes, 64);
  if (size < bytes) {
    held.reset(std::aligned_alloc(64, (bytes + 63) / 64 * 64));
    size = held ? bytes : 0;
  }
  return held.get();
}

// Rows of the weight that one output has: a weight of their own, and where they begin in the whole one.
template <class Form>
struct Part {
  Form form;
  const uint8_t* weight;
  int64_t begin;
};

// A piece of work: rows of a part.
struct Piece {
  size_t part;
  int64_t first, last;
};

// y = x W^T + bias: inputs x, weight, for dense ones scales (of int8), bias (optional). Form says how W is stored. Each
// output has the results of some rows, in order.
template <class Form>
struct Linear {
  Table api;
  const char* name;
  Form form{};
  int64_t mode = NOMUL_14_BIT;
  size_t bias_index = 2;
  std::vector<Part<Form>> parts;
  std::vector<Piece> pieces;
};

// Rows of a piece of work, tokens that are prepared at once, and the weights below which starting threads takes longer
// than they save.
constexpr int64_t kPiece = 128, kTokens = 512, kSmall = 1 << 18;

template <class Form>
void add_part(Linear<Form>& kernel, const Form& form, const uint8_t* weight, int64_t begin) {
  for (int64_t first = 0; first < form.rows; first += kPiece)
    kernel.pieces.push_back({kernel.parts.size(), first, std::min(form.rows, first + kPiece)});
  kernel.parts.push_back({form, weight, begin});
}

// The functions of the C interface for a form.
int64_t scratch_bytes(const nomul_layout& l, int64_t tokens, int64_t mode) {
  return nomul_scratch_bytes(&l, tokens, (int32_t)mode);
}
int64_t scratch_bytes(const nomul_dense& d, int64_t tokens, int64_t mode) {
  return nomul_dense_scratch_bytes(&d, tokens, (int32_t)mode);
}
int prepare(const nomul_layout& l, int64_t mode, const float* x, int64_t tokens, void* scratch) {
  return nomul_prepare(&l, (int32_t)mode, x, tokens, scratch);
}
int prepare(const nomul_dense& d, int64_t mode, const float* x, int64_t tokens, void* scratch) {
  return nomul_dense_prepare(&d, (int32_t)mode, x, tokens, scratch);
}

// The attribute `mode`; numbers that no mode has keep none.
OrtStatus* mode_of(Table api, const OrtKernelInfo* info, int64_t& mode) {
  OrtStatus* s = integer(api, info, "mode", mode);
  mode = std::clamp<int64_t>(mode, INT32_MIN, INT32_MAX);
  return s;
}

OrtStatus* create_tiled(const CustomOp*, Table api, const OrtKernelInfo* info, void** out) {
  auto kernel = std::make_unique<Linear<nomul_layout>>();
  kernel->api = api, kernel->name = "nomul::TiledLinear";
  nomul_layout& l = kernel->form;
  struct {
    const char* name;
    int32_t* place;
  } const small[] = {{"version", &l.version}, {"planes", &l.planes}, {"group", &l.group},
                     {"terms", &l.terms},     {"tied", &l.tied},     {"offset", &l.offset}};
  for (const auto& field : small) {
    int64_t value = 0;
    if (OrtStatus* s = integer(api, info, field.name, value)) return s;
    *field.place = (int32_t)std::clamp<int64_t>(value, INT32_MIN, INT32_MAX);
  }
  if (OrtStatus* s = integer(api, info, "rows", l.rows)) return s;
  if (OrtStatus* s = integer(api, info, "inputs", l.inputs)) return s;
  if (OrtStatus* s = mode_of(api, info, kernel->mode)) return s;
  const int64_t bytes = nomul_weight_bytes(&l);
  if (bytes < 0 || scratch_bytes(l, 1, kernel->mode) < 0) return failure(api, nomul_error());
  Tensor weight;
  if (OrtStatus* s = constant(api, info, 1, "the weight", ort::kUint8, weight)) return s;
  if (weight.count != bytes)
    return failure(api, "the weight has " + std::to_string(weight.count) + " bytes, its layout needs " +
                            std::to_string(bytes));
  std::vector<int64_t> parts;
  if (OrtStatus* s = integers(api, info, "parts", parts)) return s;
  if (parts.empty()) parts.push_back(l.rows);
  int64_t begin = 0;
  const uint8_t* data = (const uint8_t*)weight.data;
  for (size_t i = 0; i < parts.size(); i++) {
    // Tiles are of 32 rows, so that all parts but the last must fill theirs.
    if (parts[i] < 1 || parts[i] > l.rows - begin || (i + 1 < parts.size() && parts[i] % 32)) break;
    nomul_layout part = l;
    part.rows = parts[i];
    add_part(*kernel, part, data, begin);
    begin += parts[i], data += nomul_weight_bytes(&part);
  }
  if (kernel->parts.size() != parts.size() || begin != l.rows)
    return failure(api, "nomul::TiledLinear: the parts must be the rows of the weight, in whole tiles of 32");
  *out = kernel.release();
  return nullptr;
}

OrtStatus* create_dense(const CustomOp*, Table api, const OrtKernelInfo* info, void** out) {
  auto kernel = std::make_unique<Linear<nomul_dense>>();
  kernel->api = api, kernel->name = "nomul::DenseLinear";
  if (OrtStatus* s = mode_of(api, info, kernel->mode)) return s;
  Tensor weight, scales;
  if (OrtStatus* s = constant(api, info, 1, "the weight", ort::kAny, weight)) return s;
  const bool whole = weight.type == ort::kInt8;
  if ((weight.type != ort::kBfloat16 && weight.type != ort::kFloat16 && !whole) || weight.dims.size() != 2)
    return failure(api, "nomul::DenseLinear: the weight must be a matrix of bfloat16, float16 or int8");
  const int64_t rows = weight.dims[0], inputs = weight.dims[1];
  if (whole) {
    if (OrtStatus* s = constant(api, info, 2, "the scales", ort::kFloat16, scales)) return s;
    if (scales.dims != std::vector<int64_t>{rows, (inputs + NOMUL_BLOCK - 1) / NOMUL_BLOCK})
      return failure(api, "nomul::DenseLinear: there must be one scale for every 32 inputs of a row");
  }
  const int32_t kind = whole ? NOMUL_INT8 : weight.type == ort::kBfloat16 ? NOMUL_BFLOAT16 : NOMUL_FLOAT16;
  kernel->form = {kind, rows, inputs, scales.data}, kernel->bias_index = 3;
  if (scratch_bytes(kernel->form, 1, kernel->mode) < 0) return failure(api, nomul_error());
  add_part(*kernel, kernel->form, (const uint8_t*)weight.data, 0);
  *out = kernel.release();
  return nullptr;
}

// Some tokens of a call; y: the outputs.
template <class Form>
struct Task {
  const Linear<Form>& kernel;
  const float *bias, *x;
  const void* scratch;
  int64_t first_token, tokens;
  const std::vector<float*>& y;
  std::atomic<int> failed;
};

int rows(const nomul_layout& l, int32_t mode, const uint8_t* weight, const float* bias, const float* x,
         const void* scratch, int64_t tokens, int64_t first, int64_t last, float* y) {
  return nomul_rows(&l, mode, weight, bias, x, scratch, tokens, first, last, y);
}
int rows(const nomul_dense& d, int32_t mode, const uint8_t* weight, const float* bias, const float* x,
         const void* scratch, int64_t tokens, int64_t first, int64_t last, float* y) {
  return nomul_dense_rows(&d, mode, weight, bias, x, scratch, tokens, first, last, y);
}

template <class Form>
void one_piece(void* user, size_t index) {
  Task<Form>& t = *(Task<Form>*)user;
  const Piece& piece = t.kernel.pieces[index];
  const Part<Form>& part = t.kernel.parts[piece.part];
  const float* bias = t.bias ? t.bias + part.begin : nullptr;
  float* y = t.y[piece.part] + t.first_token * part.form.rows;
  const int code = rows(part.form, (int32_t)t.kernel.mode, part.weight, bias, t.x, t.scratch, t.tokens, piece.first,
                        piece.last, y);
  if (code) t.failed = code;
}

// Compute the results of at most kTokens tokens of x on the runtime's threads.
template <class Form>
OrtStatus* some_tokens(const Linear<Form>& k, OrtKernelContext* context, const float* bias, const float* x,
                       int64_t first_token, int64_t tokens, const std::vector<float*>& y) {
  void* scratch = scratch_of(scratch_bytes(k.form, tokens, k.mode));
  if (!scratch) return failure(k.api, std::string(k.name) + ": there is no memory for the tables", ort::kFail);
  if (prepare(k.form, k.mode, x, tokens, scratch)) return failure(k.api, nomul_error());
  Task<Form> task = {k, bias, x, scratch, first_token, tokens, y, {0}};
  const size_t count = k.pieces.size();
  if (count == 1 || k.form.rows * k.form.inputs * tokens < kSmall) {
    for (size_t i = 0; i < count; i++) one_piece<Form>(&task, i);
  } else if (OrtStatus* s = call<OrtStatus*>(k.api, ort::KernelContext_ParallelFor, (const OrtKernelContext*)context,
                                             &one_piece<Form>, count, (size_t)0, (void*)&task)) {
    return s;
  }
  return task.failed ? failure(k.api, std::string(k.name) + ": a thread has no memory of its own", ort::kFail) : nullptr;
}

template <class Form>
OrtStatus* compute_linear(void* self, OrtKernelContext* context) {
  const Linear<Form>& k = *(const Linear<Form>*)self;
  const std::string name = k.name;
  Tensor x, bias;
  if (OrtStatus* s = input(k.api, context, 0, x)) return s;
  if (x.dims.empty() || x.dims.back() != k.form.inputs)
    return failure(k.api, name + ": the last dim of the activations must be " + std::to_string(k.form.inputs));
  size_t inputs = 0;
  if (OrtStatus* s = call<OrtStatus*>(k.api, ort::KernelContext_GetInputCount, (const OrtKernelContext*)context, &inputs))
    return s;
  if (inputs > k.bias_index)
    if (OrtStatus* s = input(k.api, context, k.bias_index, bias)) return s;
  // An empty tensor has a type and no data.
  if (bias.type && bias.count != k.form.rows)
    return failure(k.api, name + ": the bias must have " + std::to_string(k.form.rows) + " values");
  const int64_t tokens = x.count / k.form.inputs;
  std::vector<int64_t> dims = x.dims;
  std::vector<float*> y(k.parts.size());
  for (size_t i = 0; i < y.size(); i++) {
    dims.back() = k.parts[i].form.rows;
    if (OrtStatus* s = output(k.api, context, i, dims, &y[i])) return s;
  }
  for (int64_t t = 0; t < tokens; t += kTokens) {
    const float* from = (const float*)x.data + t * k.form.inputs;
    const int64_t count = std::min(kTokens, tokens - t);
    if (OrtStatus* s = some_tokens(k, context, (const float*)bias.data, from, t, count, y)) return s;
  }
  return nullptr;
}

// y = H D x: inputs x, signs float [K], and the factors by columns, one input each.
struct Hadamard {
  Table api;
  int64_t width = 0, signs_last = 0;
  const float* signs = nullptr;
  std::vector<int64_t> sizes;
  std::vector<const float*> columns;
};

OrtStatus* create_hadamard(const CustomOp*, Table api, const OrtKernelInfo* info, void** out) {
  auto kernel = std::make_unique<Hadamard>();
  kernel->api = api;
  if (OrtStatus* s = integer(api, info, "transposed", kernel->signs_last)) return s;
  size_t inputs = 0;
  if (OrtStatus* s = call<OrtStatus*>(api, ort::KernelInfo_GetInputCount, info, &inputs)) return s;
  Tensor found;
  if (OrtStatus* s = constant(api, info, 1, "the signs", ort::kFloat, found)) return s;
  kernel->signs = (const float*)found.data, kernel->width = found.count;
  if (found.count < 1) return failure(api, "nomul::Hadamard: there must be at least one sign");
  for (size_t i = 2; i < inputs; i++) {
    if (OrtStatus* s = constant(api, info, i, "a factor", ort::kFloat, found)) return s;
    if (found.dims.size() != 2 || found.dims[0] != found.dims[1])
      return failure(api, "nomul::Hadamard: a factor must be a square matrix");
    kernel->sizes.push_back(found.dims[0]), kernel->columns.push_back((const float*)found.data);
  }
  *out = kernel.release();
  return nullptr;
}

// Tokens of a piece of work.
constexpr int64_t kTurned = 16;

struct Turns {
  const Hadamard& kernel;
  const float* x;
  int64_t tokens;
  float* y;
  std::atomic<int> failed;
  char why[256];
};

void turn_some(void* user, size_t index) {
  Turns& t = *(Turns*)user;
  const Hadamard& k = t.kernel;
  const int64_t first = (int64_t)index * kTurned, count = std::min(kTurned, t.tokens - first);
  if (nomul_hadamard(t.x + first * k.width, count, k.width, k.signs, (int32_t)k.signs_last, (int64_t)k.sizes.size(),
                     k.sizes.data(), k.columns.data(), t.y + first * k.width) &&
      !t.failed.exchange(1))
    std::snprintf(t.why, sizeof t.why, "%s", nomul_error());
}

OrtStatus* compute_hadamard(void* self, OrtKernelContext* context) {
  const Hadamard& k = *(const Hadamard*)self;
  Tensor x;
  if (OrtStatus* s = input(k.api, context, 0, x)) return s;
  if (x.dims.empty() || x.dims.back() != k.width)
    return failure(k.api, "nomul::Hadamard: the last dim of the activations must be " + std::to_string(k.width));
  float* y = nullptr;
  if (OrtStatus* s = output(k.api, context, 0, x.dims, &y)) return s;
  Turns turns = {k, (const float*)x.data, x.count / k.width, y, {0}, {}};
  if (turns.tokens <= kTurned) {
    turn_some(&turns, 0);
  } else if (OrtStatus* s = call<OrtStatus*>(k.api, ort::KernelContext_ParallelFor, (const OrtKernelContext*)context,
                                             &turn_some, (size_t)((turns.tokens + kTurned - 1) / kTurned), (size_t)0,
                                             (void*)&turns)) {
    return s;
  }
  return turns.failed ? failure(k.api, turns.why) : nullptr;
}

template <class Form>
CustomOp make_linear() {
  CustomOp op;
  op.input_count = [](const CustomOp*) -> size_t { return 3; };
  op.input_presence = [](const CustomOp*, size_t i) -> int { return i >= 2 ? ort::kOptional : ort::kRequired; };
  op.compute_checked = compute_linear<Form>;
  op.destroy = [](void* kernel) { delete (Linear<Form>*)kernel; };
  return op;
}

CustomOp make_tiled() {
  CustomOp op = make_linear<nomul_layout>();
  op.name = [](const CustomOp*) { return "TiledLinear"; };
  op.input_type = [](const CustomOp*, size_t i) -> int { return i == 1 ? ort::kUint8 : ort::kFloat; };
  op.create_checked = create_tiled;
  op.output_presence = [](const CustomOp*, size_t) -> int { return ort::kVariadic; };
  return op;
}

CustomOp make_dense() {
  CustomOp op = make_linear<nomul_dense>();
  op.name = [](const CustomOp*) { return "DenseLinear"; };
  op.input_count = [](const CustomOp*) -> size_t { return 4; };
  op.input_type = [](const CustomOp*, size_t i) -> int { return i == 1 || i == 2 ? ort::kAny : ort::kFloat; };
  op.create_checked = create_dense;
  return op;
}

CustomOp make_hadamard() {
  CustomOp op;
  op.name = [](const CustomOp*) { return "Hadamard"; };
  op.input_type = [](const CustomOp*, size_t) -> int { return ort::kFloat; };
  op.input_count = [](const CustomOp*) -> size_t { return 3; };
  op.input_presence = [](const CustomOp*, size_t i) -> int { return i == 2 ? ort::kVariadic : ort::kRequired; };
  op.create_checked = create_hadamard;
  op.compute_checked = compute_hadamard;
  op.destroy = [](void* kernel) { delete (Hadamard*)kernel; };
  return op;
}

CustomOp completed(CustomOp op) {
  op.provider = [](const CustomOp*) -> const char* { return nullptr; };
  op.output_type = [](const CustomOp*, size_t) -> int { return ort::kFloat; };
  op.output_count = [](const CustomOp*) -> size_t { return 1; };
  if (!op.output_presence) op.output_presence = [](const CustomOp*, size_t) -> int { return ort::kRequired; };
  op.input_memory = [](const CustomOp*, size_t) -> int { return 0; };
  op.variadic_input_least = op.variadic_output_least = [](const CustomOp*) -> int { return 1; };
  op.variadic_input_same = op.variadic_output_same = [](const CustomOp*) -> int { return 1; };
  op.first_version = [](const CustomOp*) -> int { return 1; };
  op.last_version = [](const CustomOp*) -> int { return INT32_MAX; };
  return op;
}

}  // namespace

extern "C" NOMUL_API OrtStatus* RegisterCustomOps(OrtSessionOptions* options, const ort::ApiBase* base) {
  if (!options || !base) return nullptr;
  const Table api = base->get_api(ort::kVersion);
  if (!api) {
    const Table old = base->get_api(1);
    return old ? failure(old, "nomul needs ONNX Runtime 1.17 or newer", ort::kFail) : nullptr;
  }
  static const CustomOp ops[] = {completed(make_tiled()), completed(make_dense()), completed(make_hadamard())};
  // One domain serves all sessions of a process: the runtime keeps a pointer to it.
  static OrtCustomOpDomain* domain = nullptr;
  static const bool made = [&] {
    OrtStatus* refused = call<OrtStatus*>(api, ort::CreateCustomOpDomain, "nomul", &domain);
    for (const CustomOp& op : ops)
      if (!refused) refused = call<OrtStatus*>(api, ort::CustomOpDomain_Add, domain, &op);
    // A status belongs to one caller, and there may be several.
    if (refused) call<void>(api, ort::ReleaseStatus, refused);
    return !refused;
  }();
  return made ? call<OrtStatus*>(api, ort::AddCustomOpDomain, options, domain)
              : failure(api, "the runtime does not take the operators of the domain nomul", ort::kFail);
}
