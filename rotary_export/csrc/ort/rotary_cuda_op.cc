// `rotary_export::RotaryEmbedding`, version 1, as an ONNX Runtime custom op for CUDA. It differs
// from the CPU op only in where it runs. position_ids is an input in CPU memory, so a bad id is an
// error before anything is launched, as on the CPU. If a graph computes the ids on the GPU, ORT
// copies them and waits; ids from the CPU need neither a copy nor a wait.
#include "ort/rotary_cuda_op.h"

#include "cuda/launch_rotation.h"

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

void DescribeCudaOp(const OrtApi* api, const TypePair& types, Op* op) {
  DescribeOp(api, types, op);
  op->rotate = LaunchOnStream;
  op->keeps_constants = false;
  op->GetExecutionProviderType = [](const OrtCustomOp*) { return "CUDAExecutionProvider"; };
  op->GetInputMemoryType = [](const OrtCustomOp*, size_t index) {
    return index == kPositionIds ? ort::kCpuInput : ort::kDefaultMemory;
  };
}

}  // namespace rotary_export
