// `rotary_export::RotaryEmbedding`, version 1, as an ONNX Runtime custom op for the CPU: hands
// ORT's tensors to CheckInputs and the rows to the kernel. Every call into ORT can fail with an
// OrtStatus, which goes back to ORT unchanged; nothing here throws or aborts.
#include "rotary_op.h"

#include <cstdlib>

#include "rotary_check.h"
#include "rotary_dispatch.h"

namespace rotary_export {
namespace {

using ort::OrtApi;
using ort::OrtCustomOp;

#define RETURN_IF_ERROR(call)                                            \
  do {                                                                   \
    if (OrtStatus* status_ = (call); status_ != nullptr) return status_; \
  } while (false)

enum Input { kX, kCosCache, kSinCache, kPositionIds, kKey, kScaleCache, kInputCount };
enum Output { kY, kKeyOut, kOutputCount };

ort::ElementType InputType(const Op& op, size_t index) {
  if (index == kPositionIds) return ort::kInt64;
  return index == kX || index == kKey ? op.x_type : op.table_type;
}

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
  *out = nullptr;
  if (value == nullptr) return nullptr;
  // The function reads only; ORT has no version of it for const tensors.
  RETURN_IF_ERROR(api->GetTensorMutableData(const_cast<OrtValue*>(value), &tensor->data));
  OrtTensorTypeAndShapeInfo* info = nullptr;
  RETURN_IF_ERROR(api->GetTensorTypeAndShape(value, &info));
  size_t rank = 0;
  OrtStatus* status = api->GetDimensionsCount(info, &rank);
  if (status == nullptr) {
    constexpr size_t kMaxRank = ROTARY_EXPORT_MAX_RANK;
    const size_t count = rank < kMaxRank ? rank : kMaxRank;
    status = api->GetDimensions(info, tensor->shape, count);
  }
  api->ReleaseTensorTypeAndShapeInfo(info);
  RETURN_IF_ERROR(status);
  tensor->type = InputType(*kernel.op, index);
  tensor->rank = static_cast<int32_t>(rank);
  SetContiguous(tensor);
  *out = tensor;
  return nullptr;
}

// Has ORT allocate output `index` like `input`; null if the node does not have it.
OrtStatus* AllocateOutput(const OrtApi* api, OrtKernelContext* context, size_t index,
                          const RotaryExportTensor& input, RotaryExportTensor* tensor,
                          const RotaryExportTensor** out) {
  *out = nullptr;
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

// Below this many bytes read and written per task, handing work to another thread does not pay.
constexpr int64_t kTaskBytes = 256 * 1024;

struct Work {
  const RotaryParams* params;
  RotateRowsFunction rotate_rows;
  int64_t rows;
  int64_t tasks;
};

void RunTask(void* data, size_t index) {
  const Work& work = *static_cast<const Work*>(data);
  const auto task = static_cast<int64_t>(index);
  work.rotate_rows(*work.params, work.rows * task / work.tasks,
                   work.rows * (task + 1) / work.tasks);
}

// Splits the rows over ORT's own threads.
OrtStatus* RotateInParallel(const OrtApi* api, OrtKernelContext* context,
                            const RotaryParams& params, int64_t element_size) {
  Work work = {&params, SelectedInstructionSet().rotate_rows, params.batch_size * params.seq_len,
               0};
  const int64_t heads = params.query.count + params.key.count;
  const int64_t bytes = work.rows * heads * params.head_dim * element_size * 2;
  work.tasks = bytes / kTaskBytes < work.rows ? bytes / kTaskBytes : work.rows;
  if (work.tasks < 2) {
    work.rotate_rows(params, 0, work.rows);
    return nullptr;
  }
  const size_t unlimited = 0;
  return api->KernelContext_ParallelFor(context, RunTask, static_cast<size_t>(work.tasks),
                                        unlimited, &work);
}

int64_t ElementSize(ort::ElementType type) {
  return type == ort::kDouble ? 8 : type == ort::kFloat ? 4 : 2;
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
  return RotateInParallel(api, context, params, ElementSize(kernel.op->x_type));
}

// Y and key_out have the types and shapes of X and key, symbolic dimensions included.
OrtStatus* InferShapes(const OrtCustomOp* op, OrtShapeInferContext* context) {
  const OrtApi* api = static_cast<const Op*>(op)->api;
  size_t input_count = 0;
  RETURN_IF_ERROR(api->ShapeInferContext_GetInputCount(context, &input_count));
  const size_t outputs_of[][2] = {{kX, kY}, {kKey, kKeyOut}};
  for (const auto& [input, output] : outputs_of) {
    if (input >= input_count) continue;
    OrtTensorTypeAndShapeInfo* info = nullptr;  // ORT's; not ours to release.
    RETURN_IF_ERROR(api->ShapeInferContext_GetInputTypeShape(context, input, &info));
    size_t rank = 0;
    if (info == nullptr) continue;
    RETURN_IF_ERROR(api->GetDimensionsCount(info, &rank));
    if (rank == 0) continue;  // What ORT says of an unknown shape and of an input not given.
    RETURN_IF_ERROR(api->ShapeInferContext_SetOutputTypeShape(context, output, info));
  }
  return nullptr;
}

size_t MayInplace(int** inputs, int** outputs) {
  static int may_inputs[] = {kX, kKey};
  static int may_outputs[] = {kY, kKeyOut};
  *inputs = may_inputs;
  *outputs = may_outputs;
  return kOutputCount;
}

}  // namespace

void DescribeOp(const OrtApi* api, ort::ElementType x_type, ort::ElementType table_type, Op* op) {
  op->version = ort::kApiVersion;
  op->api = api;
  op->x_type = x_type;
  op->table_type = table_type;
  op->GetName = [](const OrtCustomOp*) { return "RotaryEmbedding"; };
  op->GetExecutionProviderType = [](const OrtCustomOp*) { return "CPUExecutionProvider"; };
  op->GetInputTypeCount = [](const OrtCustomOp*) { return size_t{kInputCount}; };
  op->GetInputType = [](const OrtCustomOp* self, size_t index) {
    return InputType(*static_cast<const Op*>(self), index);
  };
  op->GetInputCharacteristic = [](const OrtCustomOp*, size_t index) {
    return index <= kSinCache ? ort::kRequired : ort::kOptional;
  };
  op->GetInputMemoryType = [](const OrtCustomOp*, size_t) { return ort::kDefaultMemory; };
  op->GetOutputTypeCount = [](const OrtCustomOp*) { return size_t{kOutputCount}; };
  op->GetOutputType = [](const OrtCustomOp* self, size_t) {
    return static_cast<const Op*>(self)->x_type;
  };
  op->GetOutputCharacteristic = [](const OrtCustomOp*, size_t index) {
    return index == kY ? ort::kRequired : ort::kOptional;
  };
  op->GetStartVersion = [](const OrtCustomOp*) { return 1; };
  op->GetEndVersion = [](const OrtCustomOp*) { return 1; };
  op->CreateKernelV2 = CreateKernel;
  op->KernelComputeV2 = Compute;
  op->KernelDestroy = std::free;
  op->InferOutputShapeFn = InferShapes;
  op->GetMayInplace = MayInplace;
  op->ReleaseMayInplace = [](int*, int*) {};
}

}  // namespace rotary_export
