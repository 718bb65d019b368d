// The op as ONNX Runtime sees it (rotary_op.cc), for its registration (register_ops.cc).
#ifndef ROTARY_EXPORT_ORT_ROTARY_OP_H_
#define ROTARY_EXPORT_ORT_ROTARY_OP_H_

#include "kernel/rotary_kernel.h"
#include "ort/ort_abi.h"

namespace rotary_export {

enum Input { kX, kCosCache, kSinCache, kPositionIds, kKey, kScaleCache, kInputCount };
enum Output { kY, kKeyOut, kOutputCount };

// The op for one pair of element types on one provider.
struct Op : ort::OrtCustomOp {
  // Rotates once everything is checked and allocated.
  OrtStatus* (*rotate)(const ort::OrtApi* api, OrtKernelContext* context, RotaryParams* params);
  const ort::OrtApi* api;
  ort::ElementType x_type;      // X, key, Y, key_out.
  ort::ElementType table_type;  // cos_cache, sin_cache, scale_cache.
  bool fast_api;                // `api` has what kFastApiVersion has.
  bool keeps_constants;         // Constant inputs are where the kernel reads them at each run.
};

void DescribeOp(const ort::OrtApi* api, ort::ElementType x_type, ort::ElementType table_type,
                Op* op);

}  // namespace rotary_export

#endif  // ROTARY_EXPORT_ORT_ROTARY_OP_H_
