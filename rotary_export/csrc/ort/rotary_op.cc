// `rotary_export::RotaryEmbedding`, version 1, as an ONNX Runtime custom op: passes ORT's tensors
// to CheckInputs and, on the CPU, the rows to the kernel. Every call into ORT can fail with an
// OrtStatus, which is returned to ORT unchanged. Nothing here throws or aborts.
#include "ort/rotary_op.h"

#include <cstdlib>

#include "kernel/input_checks.h"
#include "kernel/isa_dispatch.h"

namespace rotary_export {
namespace {

using ort::OrtApi;
using ort::OrtCustomOp;

#define RETURN_IF_ERROR(call)                                            \
  do {                                                                   \
    if (OrtStatus* status_ = (call); status_ != nullptr) return status_; \
  } while (false)

RotaryExportType InputType(const Op& op, size_t index) {
  if (index == kPositionIds) return ROTARY_EXPORT_INT64;
  return index == kX || index == kKey ? op.types.x_type : op.types.table_type;
}

struct Kernel {
  const OrtApi* api;
  const Op* op;
  int64_t interleaved;
  int64_t rotary_embedding_dim;
  int64_t num_heads;
  int64_t kv_num_heads;
  size_t input_count;
  size_t output_count;
  // Inputs that are initializers never change: usually the tables.
  bool is_constant[kInputCount];
  RotaryExportTensor constants[kInputCount];
};

// An attribute that the node does not have is an error in ORT; here it means 0.
int64_t ReadAttribute(const OrtApi* api, const OrtKernelInfo* info, const char* name) {
  int64_t value = 0;
  OrtStatus* status = api->KernelInfoGetAttribute_int64(info, name, &value);
  if (status == nullptr) return value;
  api->ReleaseStatus(status);
  return 0;
}

OrtStatus* ReadShape(const OrtApi* api, const OrtValue* value, RotaryExportTensor* tensor) {
  OrtTensorTypeAndShapeInfo* info = nullptr;
  RETURN_IF_ERROR(api->GetTensorTypeAndShape(value, &info));
  size_t rank = 0;
  OrtStatus* status = api->GetDimensionsCount(info, &rank);
  if (status == nullptr) {
    constexpr size_t kMaxRank = ROTARY_EXPORT_MAX_RANK;
    status = api->GetDimensions(info, tensor->shape, rank < kMaxRank ? rank : kMaxRank);
  }
  api->ReleaseTensorTypeAndShapeInfo(info);
  tensor->rank = static_cast<int32_t>(rank);
  return status;
}

// ReadShape without the info object, whose allocation takes as long as half a decoding step.
OrtStatus* ReadShapeFast(const OrtApi* api, const OrtValue* value, RotaryExportTensor* tensor) {
  RotaryExportType type;
  const int64_t* dims = nullptr;
  size_t rank = 0;
  RETURN_IF_ERROR(api->GetTensorElementTypeAndShapeDataReference(value, &type, &dims, &rank));
  for (size_t i = 0; i < rank && i < ROTARY_EXPORT_MAX_RANK; ++i) tensor->shape[i] = dims[i];
  tensor->rank = static_cast<int32_t>(rank);
  return nullptr;
}

OrtStatus* ReadTensor(const Op& op, size_t index, const OrtValue* value,
                      RotaryExportTensor* tensor) {
  // The function only reads; ORT has no version of it for const tensors.
  RETURN_IF_ERROR(op.api->GetTensorMutableData(const_cast<OrtValue*>(value), &tensor->data));
  RETURN_IF_ERROR(op.fast_api ? ReadShapeFast(op.api, value, tensor)
                              : ReadShape(op.api, value, tensor));
  tensor->type = InputType(op, index);
  SetContiguous(tensor);
  return nullptr;
}

OrtStatus* ReadNode(const OrtKernelInfo* info, Kernel* kernel) {
  const OrtApi* api = kernel->api;
  kernel->interleaved = ReadAttribute(api, info, "interleaved");
  kernel->rotary_embedding_dim = ReadAttribute(api, info, "rotary_embedding_dim");
  kernel->num_heads = ReadAttribute(api, info, "num_heads");
  kernel->kv_num_heads = ReadAttribute(api, info, "kv_num_heads");
  RETURN_IF_ERROR(api->KernelInfo_GetInputCount(info, &kernel->input_count));
  RETURN_IF_ERROR(api->KernelInfo_GetOutputCount(info, &kernel->output_count));
  if (kernel->input_count > kInputCount) kernel->input_count = kInputCount;
  for (size_t i = 0; kernel->op->keeps_constants && i < kernel->input_count; ++i) {
    int is_constant = 0;
    const OrtValue* value = nullptr;
    RETURN_IF_ERROR(api->KernelInfoGetConstantInput_tensor(info, i, &is_constant, &value));
    kernel->is_constant[i] = is_constant != 0 && value != nullptr;
    if (!kernel->is_constant[i]) continue;
    RETURN_IF_ERROR(ReadTensor(*kernel->op, i, value, &kernel->constants[i]));
  }
  return nullptr;
}

OrtStatus* CreateKernel(const OrtCustomOp* op, const OrtApi* api, const OrtKernelInfo* info,
                        void** out) {
  auto* kernel = static_cast<Kernel*>(std::calloc(1, sizeof(Kernel)));
  if (kernel == nullptr) return api->CreateStatus(ort::kFail, "out of memory");
  kernel->op = static_cast<const Op*>(op);
  kernel->api = kernel->op->api;
  if (OrtStatus* status = ReadNode(info, kernel)) {
    std::free(kernel);
    return status;
  }
  *out = kernel;
  return nullptr;
}

// Points `out` at input `index`, read into `tensor` if it can change. Null if the node lacks it.
OrtStatus* ReadInput(const Kernel& kernel, const OrtKernelContext* context, size_t index,
                     RotaryExportTensor* tensor, const RotaryExportTensor** out) {
  if (kernel.is_constant[index]) {
    *out = &kernel.constants[index];
    return nullptr;
  }
  const OrtValue* value = nullptr;
  RETURN_IF_ERROR(kernel.api->KernelContext_GetInput(context, index, &value));
  if (value == nullptr) return nullptr;
  *out = tensor;
  return ReadTensor(*kernel.op, index, value, tensor);
}

// Lets ORT allocate output `index` like `input` and points `out` at it. Null if the node lacks it.
OrtStatus* AllocateOutput(const Kernel& kernel, OrtKernelContext* context, size_t index,
                          const RotaryExportTensor& input, RotaryExportTensor* tensor,
                          const RotaryExportTensor** out) {
  if (index >= kernel.output_count) return nullptr;
  OrtValue* value = nullptr;
  RETURN_IF_ERROR(kernel.api->KernelContext_GetOutput(context, index, input.shape,
                                                      static_cast<size_t>(input.rank), &value));
  if (value == nullptr) return nullptr;
  *tensor = input;
  RETURN_IF_ERROR(kernel.api->GetTensorMutableData(value, &tensor->data));
  *out = tensor;
  return nullptr;
}

// Tasks that read and write fewer bytes than this are not worth another thread.
constexpr int64_t kTaskBytes = 256 * 1024;

struct Work {
  const RotaryParams* params;
  RotateRowsFunction rotate_rows;
  int64_t tasks;
};

void RunTask(void* data, size_t index) {
  const Work& work = *static_cast<const Work*>(data);
  RotatePart(*work.params, work.rotate_rows, static_cast<int64_t>(index), work.tasks);
}

// Splits the rows over ORT's threads.
OrtStatus* RotateInParallel(const OrtApi* api, OrtKernelContext* context, RotaryParams* params) {
  const int64_t rows = params->batch_size * params->seq_len;
  Work work = {params, ChooseRotation(params), OutputBytes(*params) * 2 / kTaskBytes};
  if (work.tasks > rows) work.tasks = rows;
  if (work.tasks < 2) {
    work.rotate_rows(*params, 0, rows);
    return nullptr;
  }
  const size_t unlimited = 0;
  return api->KernelContext_ParallelFor(context, RunTask, static_cast<size_t>(work.tasks),
                                        unlimited, &work);
}

// The call without its outputs.
RotaryExportCall MakeCall(const Kernel& kernel, const RotaryExportTensor* const* inputs) {
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
  return call;
}

OrtStatus* Compute(void* data, OrtKernelContext* context) {
  const Kernel& kernel = *static_cast<const Kernel*>(data);
  const OrtApi* api = kernel.api;
  RotaryExportTensor tensors[kInputCount];
  const RotaryExportTensor* inputs[kInputCount] = {};
  for (size_t i = 0; i < kernel.input_count; ++i) {
    RETURN_IF_ERROR(ReadInput(kernel, context, i, &tensors[i], &inputs[i]));
  }
  RotaryExportCall call = MakeCall(kernel, inputs);
  RotaryParams params;
  Message message;
  if (!CheckInputs(call, &params, &message) || !CheckPositions(params, &message)) {
    return api->CreateStatus(ort::kInvalidArgument, message.text);
  }
  RotaryExportTensor y, key_out;
  RETURN_IF_ERROR(AllocateOutput(kernel, context, kY, *call.x, &y, &call.y));
  // Without a key, the node must not have a key_out. X's shape serves to find out.
  const RotaryExportTensor& key = call.key != nullptr ? *call.key : *call.x;
  RETURN_IF_ERROR(AllocateOutput(kernel, context, kKeyOut, key, &key_out, &call.key_out));
  if (!CheckOutputs(call, &params, &message)) {
    return api->CreateStatus(ort::kInvalidArgument, message.text);
  }
  return kernel.op->rotate(api, context, &params);
}

// Y and key_out have the types and shapes of X and key, symbolic dimensions included.
OrtStatus* InferShapes(const OrtCustomOp* op, OrtShapeInferContext* context) {
  const OrtApi* api = static_cast<const Op*>(op)->api;
  size_t input_count = 0;
  RETURN_IF_ERROR(api->ShapeInferContext_GetInputCount(context, &input_count));
  const size_t outputs_of[][2] = {{kX, kY}, {kKey, kKeyOut}};
  for (const auto& [input, output] : outputs_of) {
    if (input >= input_count) continue;
    OrtTensorTypeAndShapeInfo* info = nullptr;  // Owned by ORT: not to be released here.
    RETURN_IF_ERROR(api->ShapeInferContext_GetInputTypeShape(context, input, &info));
    size_t rank = 0;
    if (info == nullptr) continue;
    RETURN_IF_ERROR(api->GetDimensionsCount(info, &rank));
    if (rank == 0) continue;  // ORT reports this for an unknown shape and for an absent input.
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

void DescribeOp(const OrtApi* api, const TypePair& types, Op* op) {
  op->version = ort::kApiVersion;
  op->rotate = RotateInParallel;
  op->keeps_constants = true;
  op->api = api;
  op->types = types;
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
    return static_cast<const Op*>(self)->types.x_type;
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
