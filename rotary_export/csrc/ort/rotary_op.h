// The op as an ONNX Runtime custom op (rotary_op.cc), for its registration (register_ops.cc).
#ifndef ROTARY_EXPORT_ORT_ROTARY_OP_H_
#define ROTARY_EXPORT_ORT_ROTARY_OP_H_

#include "kernel/rotary_kernel.h"
#include "ort/ort_abi.h"

namespace rotary_export {

enum Input { kX, kCosCache, kSinCache, kPositionIds, kKey, kScaleCache, kInputCount };
enum Output { kY, kKeyOut, kOutputCount };

// The op for one pair of element types on one provider.
struct Op : ort::OrtCustomOp {
  // Rotates after all checks and allocations.
  OrtStatus* (*rotate)(const ort::OrtApi* api, OrtKernelContext* context, RotaryParams* params);
  const ort::OrtApi* api;
  TypePair types;
  bool fast_api;         // `api` has the functions of kFastApiVersion.
  bool keeps_constants;  // The kernel may read constant inputs once, when it is created.
};

// Fills `op` with the op for the CPU.
void DescribeOp(const ort::OrtApi* api, const TypePair& types, Op* op);

}  // namespace rotary_export

#endif  // ROTARY_EXPORT_ORT_ROTARY_OP_H_
