// The rotation on a CUDA stream: launch_plan.cc's plans, handed to the driver.
#ifndef ROTARY_EXPORT_CUDA_CUDA_ROTATE_H_
#define ROTARY_EXPORT_CUDA_CUDA_ROTATE_H_

#include "kernel/message.h"
#include "kernel/rotary_kernel.h"

struct CUstream_st;

namespace rotary_export {

// Enqueues the rotation of all rows on `stream`, whose context must be current, and returns without
// waiting for it. All of `params` points to the device's memory but position_ids, which the host
// reads here and now; they have been checked before. Returns false with a message.
bool LaunchRotation(const RotaryParams& params, CUstream_st* stream, Message* message);

}  // namespace rotary_export

#endif  // ROTARY_EXPORT_CUDA_CUDA_ROTATE_H_
