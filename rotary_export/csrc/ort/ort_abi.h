// The part of ONNX Runtime's C ABI that the op uses, so that the build needs no ORT headers.
//
// OrtApi is a table of function pointers that only grows at its end: a released slot number holds
// in every later runtime. Version 18 has everything that the op needs, so the library requests that
// version. If the runtime has version 24, one more function saves time.
// tests/csrc/test_ort_abi.py compares every slot, offset, signature and constant below with the
// official onnxruntime_c_api.h.
#ifndef ROTARY_EXPORT_ORT_ORT_ABI_H_
#define ROTARY_EXPORT_ORT_ORT_ABI_H_

#include <cstddef>
#include <cstdint>

#include "rotary_export.h"

// Opaque handles that ORT owns. At global scope, as in ORT.
struct OrtCustomOpDomain;
struct OrtKernelContext;
struct OrtKernelInfo;
struct OrtSessionOptions;
struct OrtShapeInferContext;
struct OrtStatus;  // A null OrtStatus* is success; the receiver releases any other.
struct OrtTensorTypeAndShapeInfo;
struct OrtValue;

namespace rotary_export::ort {

constexpr uint32_t kApiVersion = 18;
constexpr uint32_t kFastApiVersion = 24;  // Has GetTensorElementTypeAndShapeDataReference.

enum ErrorCode : int { kFail = 1, kInvalidArgument = 2 };

enum Characteristic : int { kRequired = 0, kOptional = 1 };

enum MemoryType : int { kCpuInput = -2, kDefaultMemory = 0 };

// The description of one op. ORT reads the members that exist in `version`. Element types are
// RotaryExportType: its numbers are those of ONNXTensorElementDataType.
struct OrtCustomOp {
  uint32_t version;
  void* CreateKernel;  // Superseded by CreateKernelV2, which can report an error.
  const char* (*GetName)(const OrtCustomOp* op);
  const char* (*GetExecutionProviderType)(const OrtCustomOp* op);
  RotaryExportType (*GetInputType)(const OrtCustomOp* op, size_t index);
  size_t (*GetInputTypeCount)(const OrtCustomOp* op);
  RotaryExportType (*GetOutputType)(const OrtCustomOp* op, size_t index);
  size_t (*GetOutputTypeCount)(const OrtCustomOp* op);
  void* KernelCompute;  // Superseded by KernelComputeV2.
  void (*KernelDestroy)(void* kernel);
  Characteristic (*GetInputCharacteristic)(const OrtCustomOp* op, size_t index);
  Characteristic (*GetOutputCharacteristic)(const OrtCustomOp* op, size_t index);
  MemoryType (*GetInputMemoryType)(const OrtCustomOp* op, size_t index);
  void* variadic[4];  // For ops with variadic inputs or outputs.
  OrtStatus* (*CreateKernelV2)(const OrtCustomOp* op, const struct OrtApi* api,
                               const OrtKernelInfo* info, void** kernel);
  OrtStatus* (*KernelComputeV2)(void* kernel, OrtKernelContext* context);
  OrtStatus* (*InferOutputShapeFn)(const OrtCustomOp* op, OrtShapeInferContext* context);
  int (*GetStartVersion)(const OrtCustomOp* op);
  int (*GetEndVersion)(const OrtCustomOp* op);
  size_t (*GetMayInplace)(int** inputs, int** outputs);
  void (*ReleaseMayInplace)(int* inputs, int* outputs);
  void* GetAliasMap;
  void* ReleaseAliasMap;
};
static_assert(sizeof(OrtCustomOp) == 208, "the layout of a 64-bit machine");

struct OrtApi {
  OrtStatus* (*CreateStatus)(ErrorCode code, const char* message);
  void* slots_1_25[25];
  OrtStatus* (*CreateCustomOpDomain)(const char* name, OrtCustomOpDomain** domain);
  OrtStatus* (*CustomOpDomain_Add)(OrtCustomOpDomain* domain, const OrtCustomOp* op);
  OrtStatus* (*AddCustomOpDomain)(OrtSessionOptions* options, OrtCustomOpDomain* domain);
  void* slots_29_50[22];
  OrtStatus* (*GetTensorMutableData)(OrtValue* value, void** data);
  void* slots_52_60[9];
  OrtStatus* (*GetDimensionsCount)(const OrtTensorTypeAndShapeInfo* info, size_t* rank);
  OrtStatus* (*GetDimensions)(const OrtTensorTypeAndShapeInfo* info, int64_t* dims, size_t count);
  void* slots_63_64[2];
  OrtStatus* (*GetTensorTypeAndShape)(const OrtValue* value, OrtTensorTypeAndShapeInfo** info);
  void* slots_66_85[20];
  OrtStatus* (*KernelInfoGetAttribute_int64)(const OrtKernelInfo* info, const char* name,
                                             int64_t* value);
  void* slot_87;
  OrtStatus* (*KernelContext_GetInputCount)(const OrtKernelContext* context, size_t* count);
  OrtStatus* (*KernelContext_GetOutputCount)(const OrtKernelContext* context, size_t* count);
  OrtStatus* (*KernelContext_GetInput)(const OrtKernelContext* context, size_t index,
                                       const OrtValue** value);
  OrtStatus* (*KernelContext_GetOutput)(OrtKernelContext* context, size_t index,
                                        const int64_t* dims, size_t rank, OrtValue** value);
  void* slot_92;
  void (*ReleaseStatus)(OrtStatus* status);
  void* slots_94_98[5];
  void (*ReleaseTensorTypeAndShapeInfo)(OrtTensorTypeAndShapeInfo* info);
  void* slot_100;
  void (*ReleaseCustomOpDomain)(OrtCustomOpDomain* domain);
  void* slots_102_192[91];
  OrtStatus* (*KernelContext_GetGPUComputeStream)(const OrtKernelContext* context, void** stream);
  void* slots_194_229[36];
  OrtStatus* (*KernelInfo_GetInputCount)(const OrtKernelInfo* info, size_t* count);
  OrtStatus* (*KernelInfo_GetOutputCount)(const OrtKernelInfo* info, size_t* count);
  void* slots_232_248[17];
  OrtStatus* (*KernelInfoGetConstantInput_tensor)(const OrtKernelInfo* info, size_t index,
                                                  int* is_constant, const OrtValue** value);
  void* slots_250_266[17];
  OrtStatus* (*ShapeInferContext_GetInputCount)(const OrtShapeInferContext* context, size_t* count);
  OrtStatus* (*ShapeInferContext_GetInputTypeShape)(const OrtShapeInferContext* context,
                                                    size_t index, OrtTensorTypeAndShapeInfo** info);
  void* slot_269;
  OrtStatus* (*ShapeInferContext_SetOutputTypeShape)(const OrtShapeInferContext* context,
                                                     size_t index,
                                                     const OrtTensorTypeAndShapeInfo* info);
  void* slots_271_273[3];
  OrtStatus* (*KernelContext_ParallelFor)(const OrtKernelContext* context,
                                          void (*task)(void* data, size_t index), size_t total,
                                          size_t max_batches, void* data);
  void* slots_275_413[139];
  // Since version 24: neither allocates nor copies.
  OrtStatus* (*GetTensorElementTypeAndShapeDataReference)(const OrtValue* value,
                                                          RotaryExportType* type,
                                                          const int64_t** dims, size_t* rank);
};

// Every function that the op uses, with its slot.
#define ROTARY_EXPORT_ORT_SLOTS(SLOT)             \
  SLOT(CreateStatus, 0)                           \
  SLOT(CreateCustomOpDomain, 26)                  \
  SLOT(CustomOpDomain_Add, 27)                    \
  SLOT(AddCustomOpDomain, 28)                     \
  SLOT(GetTensorMutableData, 51)                  \
  SLOT(GetDimensionsCount, 61)                    \
  SLOT(GetDimensions, 62)                         \
  SLOT(GetTensorTypeAndShape, 65)                 \
  SLOT(KernelInfoGetAttribute_int64, 86)          \
  SLOT(KernelContext_GetInputCount, 88)           \
  SLOT(KernelContext_GetOutputCount, 89)          \
  SLOT(KernelContext_GetInput, 90)                \
  SLOT(KernelContext_GetOutput, 91)               \
  SLOT(ReleaseStatus, 93)                         \
  SLOT(ReleaseTensorTypeAndShapeInfo, 99)         \
  SLOT(ReleaseCustomOpDomain, 101)                \
  SLOT(KernelContext_GetGPUComputeStream, 193)    \
  SLOT(KernelInfo_GetInputCount, 230)             \
  SLOT(KernelInfo_GetOutputCount, 231)            \
  SLOT(KernelInfoGetConstantInput_tensor, 249)    \
  SLOT(ShapeInferContext_GetInputCount, 267)      \
  SLOT(ShapeInferContext_GetInputTypeShape, 268)  \
  SLOT(ShapeInferContext_SetOutputTypeShape, 270) \
  SLOT(KernelContext_ParallelFor, 274)

#define ROTARY_EXPORT_ORT_SLOTS_SINCE_24(SLOT) SLOT(GetTensorElementTypeAndShapeDataReference, 414)

#define ROTARY_EXPORT_ASSERT_SLOT(name, slot) \
  static_assert(offsetof(OrtApi, name) == (slot) * sizeof(void*), #name);
ROTARY_EXPORT_ORT_SLOTS(ROTARY_EXPORT_ASSERT_SLOT)
ROTARY_EXPORT_ORT_SLOTS_SINCE_24(ROTARY_EXPORT_ASSERT_SLOT)
#undef ROTARY_EXPORT_ASSERT_SLOT

struct OrtApiBase {
  const OrtApi* (*GetApi)(uint32_t version);  // Null if the runtime is older than `version`.
  const char* (*GetVersionString)();
};

}  // namespace rotary_export::ort

#endif  // ROTARY_EXPORT_ORT_ORT_ABI_H_
