// The part of ONNX Runtime's C interface that a library of operators needs, declared by place: the runtime hands over a
// table of functions to which releases only append. Places are those of its released versions up to 17.
#pragma once

#include <cstddef>
#include <cstdint>

struct OrtStatus;
struct OrtKernelInfo;
struct OrtKernelContext;
struct OrtValue;
struct OrtSessionOptions;
struct OrtCustomOpDomain;
struct OrtTensorTypeAndShapeInfo;

namespace ort {

constexpr uint32_t kVersion = 17;

using Table = const void* const*;

struct ApiBase {
  Table (*get_api)(uint32_t version);
  const char* (*version)();
};

enum Place : int {
  CreateStatus = 0,
  CreateCustomOpDomain = 26,
  CustomOpDomain_Add = 27,
  AddCustomOpDomain = 28,
  GetTensorMutableData = 51,
  GetTensorElementType = 60,
  GetDimensionsCount = 61,
  GetDimensions = 62,
  GetTensorShapeElementCount = 64,
  GetTensorTypeAndShape = 65,
  KernelInfoGetAttribute_int64 = 86,
  KernelContext_GetInputCount = 88,
  KernelContext_GetInput = 90,
  KernelContext_GetOutput = 91,
  ReleaseStatus = 93,
  ReleaseTensorTypeAndShapeInfo = 99,
  KernelInfoGetAttributeArray_int64 = 163,
  KernelInfo_GetInputCount = 230,
  KernelInfoGetConstantInput_tensor = 249,
  KernelContext_ParallelFor = 274,
};

template <class R, class... A>
inline R call(Table api, Place place, A... arguments) {
  return reinterpret_cast<R (*)(A...)>(const_cast<void*>(api[place]))(arguments...);
}

enum ElementType : int { kAny = 0, kFloat = 1, kUint8 = 2, kInt8 = 3, kFloat16 = 10, kBfloat16 = 16 };
enum Presence : int { kRequired = 0, kOptional = 1, kVariadic = 2 };
enum Code : int { kFail = 1, kInvalidArgument = 2 };

// Fields in the runtime's order. Those after `version` are functions; a null one is taken as its default.
struct CustomOp {
  uint32_t version = kVersion;
  void* (*create)(const CustomOp*, Table, const OrtKernelInfo*) = nullptr;
  const char* (*name)(const CustomOp*) = nullptr;
  const char* (*provider)(const CustomOp*) = nullptr;
  int (*input_type)(const CustomOp*, size_t) = nullptr;
  size_t (*input_count)(const CustomOp*) = nullptr;
  int (*output_type)(const CustomOp*, size_t) = nullptr;
  size_t (*output_count)(const CustomOp*) = nullptr;
  void (*compute)(void*, OrtKernelContext*) = nullptr;
  void (*destroy)(void*) = nullptr;
  int (*input_presence)(const CustomOp*, size_t) = nullptr;
  int (*output_presence)(const CustomOp*, size_t) = nullptr;
  int (*input_memory)(const CustomOp*, size_t) = nullptr;
  int (*variadic_input_least)(const CustomOp*) = nullptr;
  int (*variadic_input_same)(const CustomOp*) = nullptr;
  int (*variadic_output_least)(const CustomOp*) = nullptr;
  int (*variadic_output_same)(const CustomOp*) = nullptr;
  OrtStatus* (*create_checked)(const CustomOp*, Table, const OrtKernelInfo*, void**) = nullptr;
  OrtStatus* (*compute_checked)(void*, OrtKernelContext*) = nullptr;
  OrtStatus* (*infer_shape)(const CustomOp*, void*) = nullptr;
  int (*first_version)(const CustomOp*) = nullptr;
  int (*last_version)(const CustomOp*) = nullptr;
};

}  // namespace ort
