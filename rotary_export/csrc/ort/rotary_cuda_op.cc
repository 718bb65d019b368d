// `rotary_export::RotaryEmbedding`, version 1, as an ONNX Runtime custom op for CUDA: the CPU's op
// but for where it runs. position_ids is an input in the CPU's memory, so that a bad id is an error
// before anything is launched, as on the CPU. Ids that a graph computes on the GPU are copied by
// ORT, which waits for them; ids that come from the CPU cost neither a copy nor a wait.
#include "ort/rotary_cuda_op.h"

#include "cuda/cuda_rotate.h"

namespace rotary_export {
namespace {

using ort::OrtApi;
using ort::OrtCustomOp;

OrtStatus* LaunchOnStream(const OrtApi* api, OrtKernelContext* context, RotaryParams* params) {
  void* stream = nullptr;
  Message message;
  OrtStatus* status = api->KernelContext_GetGPUComputeStream(context, &stream);
  if (status != nullptr) return status;
  if (LaunchRotation(*params, static_cast<CUstream_st*>(stream), &message)) return nullptr;
  return api->CreateStatus(ort::kFail, message.text);
}

}  // namespace

void DescribeCudaOp(const OrtApi* api, ort::ElementType x_type, ort::ElementType table_type,
                    Op* op) {
  DescribeOp(api, x_type, table_type, op);
  op->rotate = LaunchOnStream;
  op->keeps_constants = false;
  op->GetExecutionProviderType = [](const OrtCustomOp*) { return "CUDAExecutionProvider"; };
  op->GetInputMemoryType = [](const OrtCustomOp*, size_t index) {
    return index == kPositionIds ? ort::kCpuInput : ort::kDefaultMemory;
  };
}

}  // namespace rotary_export
