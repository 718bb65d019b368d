// `rotary_export::RotaryEmbedding`, version 1, as an ONNX Runtime custom op for CUDA: the CPU's op
// but for where it runs. position_ids is an input in the CPU's memory, so that a bad id is an error
// before anything is launched, as on the CPU. Ids that a graph computes on the GPU are copied by
// ORT, which waits for them; ids that come from the CPU cost neither a copy nor a wait.
#include "rotary_cuda_op.h"

#include <cstdlib>

#include "rotary_check.h"
#include "rotary_cuda.h"

namespace rotary_export {
namespace {

using ort::OrtApi;
using ort::OrtCustomOp;

#define RETURN_IF_ERROR(call)                                            \
  do {                                                                   \
    if (OrtStatus* status_ = (call); status_ != nullptr) return status_; \
  } while (false)

enum Input { kX, kCosCache, kSinCache, kPositionIds, kKey, kScaleCache, kInputCount };
enum Output { kY, kKeyOut };

struct Kernel {
  const OrtApi* api;
  const Op* op;
  int64_t interleaved;
  int64_t rotary_embedding_dim;
  int64_t num_heads;
  int64_t kv_num_heads;
};

// Reading an attribute that the node does not have is an error to ORT; here it means 0.
int64_t ReadAttribute(const OrtApi* api, const OrtKernelInfo* info, const char* name) {
  int64_t value = 0;
  OrtStatus* status = api->KernelInfoGetAttribute_int64(info, name, &value);
  if (status == nullptr) return value;
  api->ReleaseStatus(status);
  return 0;
}

OrtStatus* CreateKernel(const OrtCustomOp* op, const OrtApi* api, const OrtKernelInfo* info,
                        void** out) {
  auto* kernel = static_cast<Kernel*>(std::malloc(sizeof(Kernel)));
  if (kernel == nullptr) return api->CreateStatus(ort::kFail, "out of memory");
  *kernel = {api,
             static_cast<const Op*>(op),
             ReadAttribute(api, info, "interleaved"),
             ReadAttribute(api, info, "rotary_embedding_dim"),
             ReadAttribute(api, info, "num_heads"),
             ReadAttribute(api, info, "kv_num_heads")};
  *out = kernel;
  return nullptr;
}

// Describes input `index` in `tensor` and points `out` at it; null if the node does not have it.
OrtStatus* ReadInput(const Kernel& kernel, const OrtKernelContext* context, size_t index,
                     RotaryExportTensor* tensor, const RotaryExportTensor** out) {
  const OrtApi* api = kernel.api;
  const OrtValue* value = nullptr;
  RETURN_IF_ERROR(api->KernelContext_GetInput(context, index, &value));
  if (value == nullptr) return nullptr;
  // The function reads only; ORT has no version of it for const tensors.
  RETURN_IF_ERROR(api->GetTensorMutableData(const_cast<OrtValue*>(value), &tensor->data));
  OrtTensorTypeAndShapeInfo* info = nullptr;
  RETURN_IF_ERROR(api->GetTensorTypeAndShape(value, &info));
  size_t rank = 0;
  OrtStatus* status = api->GetDimensionsCount(info, &rank);
  if (status == nullptr) {
    constexpr size_t kMaxRank = ROTARY_EXPORT_MAX_RANK;
    status = api->GetDimensions(info, tensor->shape, rank < kMaxRank ? rank : kMaxRank);
  }
  api->ReleaseTensorTypeAndShapeInfo(info);
  RETURN_IF_ERROR(status);
  tensor->type = kernel.op->GetInputType(kernel.op, index);
  tensor->rank = static_cast<int32_t>(rank);
  SetContiguous(tensor);
  *out = tensor;
  return nullptr;
}

// Has ORT allocate output `index` like `input`; null if the node does not have it.
OrtStatus* AllocateOutput(const OrtApi* api, OrtKernelContext* context, size_t index,
                          const RotaryExportTensor& input, RotaryExportTensor* tensor,
                          const RotaryExportTensor** out) {
  size_t count = 0;
  RETURN_IF_ERROR(api->KernelContext_GetOutputCount(context, &count));
  if (index >= count) return nullptr;
  OrtValue* value = nullptr;
  RETURN_IF_ERROR(api->KernelContext_GetOutput(context, index, input.shape,
                                               static_cast<size_t>(input.rank), &value));
  if (value == nullptr) return nullptr;
  *tensor = input;
  RETURN_IF_ERROR(api->GetTensorMutableData(value, &tensor->data));
  *out = tensor;
  return nullptr;
}

OrtStatus* Compute(void* data, OrtKernelContext* context) {
  const Kernel& kernel = *static_cast<const Kernel*>(data);
  const OrtApi* api = kernel.api;
  RotaryExportTensor tensors[kInputCount];
  const RotaryExportTensor* inputs[kInputCount] = {};
  size_t input_count = 0;
  RETURN_IF_ERROR(api->KernelContext_GetInputCount(context, &input_count));
  for (size_t i = 0; i < input_count && i < kInputCount; ++i) {
    RETURN_IF_ERROR(ReadInput(kernel, context, i, &tensors[i], &inputs[i]));
  }
  RotaryExportCall call = {};
  call.x = inputs[kX];
  call.cos_cache = inputs[kCosCache];
  call.sin_cache = inputs[kSinCache];
  call.position_ids = inputs[kPositionIds];
  call.key = inputs[kKey];
  call.scale_cache = inputs[kScaleCache];
  call.interleaved = kernel.interleaved;
  call.rotary_embedding_dim = kernel.rotary_embedding_dim;
  call.num_heads = kernel.num_heads;
  call.kv_num_heads = kernel.kv_num_heads;

  RotaryParams params;
  Message message;
  if (!CheckInputs(call, &params, &message) || !CheckPositions(params, &message)) {
    return api->CreateStatus(ort::kInvalidArgument, message.text);
  }
  RotaryExportTensor y, key_out;
  RETURN_IF_ERROR(AllocateOutput(api, context, kY, *call.x, &y, &call.y));
  // Without a key, X's shape serves to find out whether the node has a key_out, which is an error.
  const RotaryExportTensor& key = call.key != nullptr ? *call.key : *call.x;
  RETURN_IF_ERROR(AllocateOutput(api, context, kKeyOut, key, &key_out, &call.key_out));
  if (!CheckOutputs(call, &params, &message)) {
    return api->CreateStatus(ort::kInvalidArgument, message.text);
  }
  void* stream = nullptr;
  RETURN_IF_ERROR(api->KernelContext_GetGPUComputeStream(context, &stream));
  if (!LaunchRotation(params, static_cast<CUstream_st*>(stream), &message)) {
    return api->CreateStatus(ort::kFail, message.text);
  }
  return nullptr;
}

}  // namespace

void DescribeCudaOp(const OrtApi* api, ort::ElementType x_type, ort::ElementType table_type,
                    Op* op) {
  DescribeOp(api, x_type, table_type, op);
  op->GetExecutionProviderType = [](const OrtCustomOp*) { return "CUDAExecutionProvider"; };
  op->GetInputMemoryType = [](const OrtCustomOp*, size_t index) {
    return index == kPositionIds ? ort::kCpuInput : ort::kDefaultMemory;
  };
  op->CreateKernelV2 = CreateKernel;
  op->KernelComputeV2 = Compute;
  op->KernelDestroy = std::free;
}

}  // namespace rotary_export
