// The op for ONNX Runtime's CUDA provider (rotary_cuda_op.cc), for rotary_register.cc.
#ifndef ROTARY_EXPORT_ROTARY_CUDA_OP_H_
#define ROTARY_EXPORT_ROTARY_CUDA_OP_H_

#include "rotary_op.h"

namespace rotary_export {

void DescribeCudaOp(const ort::OrtApi* api, ort::ElementType x_type, ort::ElementType table_type,
                    Op* op);

}  // namespace rotary_export

#endif  // ROTARY_EXPORT_ROTARY_CUDA_OP_H_
