// Launches the rotation on a CUDA stream, as planned by launch_plan.cc.
#ifndef ROTARY_EXPORT_CUDA_LAUNCH_ROTATION_H_
#define ROTARY_EXPORT_CUDA_LAUNCH_ROTATION_H_

#include "kernel/rotary_kernel.h"
#include "message.h"

struct CUstream_st;

namespace rotary_export {

// Enqueues the rotation of all rows on `stream` and returns without waiting for it. The context of
// `stream` must be current. All pointers in `params` are to device memory except position_ids,
// which is read on the host during this call and must have been checked. Returns false with a
// message.
bool LaunchRotation(const RotaryParams& params, CUstream_st* stream, Message* message);

}  // namespace rotary_export

#endif  // ROTARY_EXPORT_CUDA_LAUNCH_ROTATION_H_
