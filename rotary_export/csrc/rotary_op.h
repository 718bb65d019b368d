// The op as ONNX Runtime sees it (rotary_op.cc), for its registration (rotary_register.cc).
#ifndef ROTARY_EXPORT_ROTARY_OP_H_
#define ROTARY_EXPORT_ROTARY_OP_H_

#include "ort_abi.h"

namespace rotary_export {

// The op for one pair of element types.
struct Op : ort::OrtCustomOp {
  const ort::OrtApi* api;
  ort::ElementType x_type;      // X, key, Y, key_out.
  ort::ElementType table_type;  // cos_cache, sin_cache, scale_cache.
};

void DescribeOp(const ort::OrtApi* api, ort::ElementType x_type, ort::ElementType table_type,
                Op* op);

}  // namespace rotary_export

#endif  // ROTARY_EXPORT_ROTARY_OP_H_
