// The op for ONNX Runtime's CUDA provider (rotary_cuda_op.cc), for register_ops.cc.
#ifndef ROTARY_EXPORT_ORT_ROTARY_CUDA_OP_H_
#define ROTARY_EXPORT_ORT_ROTARY_CUDA_OP_H_

#include "ort/rotary_op.h"

namespace rotary_export {

// Fills `op` with the op for CUDA.
void DescribeCudaOp(const ort::OrtApi* api, const TypePair& types, Op* op);

}  // namespace rotary_export

#endif  // ROTARY_EXPORT_ORT_ROTARY_CUDA_OP_H_
