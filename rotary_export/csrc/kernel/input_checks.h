// Checks one call of the op, once, and turns it into the kernel's plain RotaryParams.
//
// rotary_export/op/spec.py makes the same checks in the same order with the same sentences.
// tests/op/test_op_library.py compares the two.
#ifndef ROTARY_EXPORT_KERNEL_INPUT_CHECKS_H_
#define ROTARY_EXPORT_KERNEL_INPUT_CHECKS_H_

#include "kernel/rotary_kernel.h"
#include "message.h"
#include "rotary_export.h"

namespace rotary_export {

// All functions below return false with a message if a check fails.

// Makes all the checks below.
bool CheckCall(const RotaryExportCall& call, RotaryParams* params, Message* message);

// Checks types, shapes and attributes (not the outputs). Fills all of `params` but the outputs'
// pointers and strides.
bool CheckInputs(const RotaryExportCall& call, RotaryParams* params, Message* message);

// Checks that every position that a row uses is in [0, table_rows). The kernel relies on it, so
// this must run before anything is written.
bool CheckPositions(const RotaryParams& params, Message* message);

// Checks the outputs against their inputs and completes `params`.
bool CheckOutputs(const RotaryExportCall& call, RotaryParams* params, Message* message);

// Sets the strides of a contiguous tensor.
void SetContiguous(RotaryExportTensor* tensor);

}  // namespace rotary_export

#endif  // ROTARY_EXPORT_KERNEL_INPUT_CHECKS_H_
