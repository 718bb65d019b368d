// Checks one call of the op, once, and turns it into the kernel's plain RotaryParams.
//
// rotary_export/op/spec.py states the same checks in the same order and with the same sentences;
// tests/op/test_op_library.py holds the two against each other.
#ifndef ROTARY_EXPORT_KERNEL_INPUT_CHECKS_H_
#define ROTARY_EXPORT_KERNEL_INPUT_CHECKS_H_

#include "kernel/message.h"
#include "kernel/rotary_kernel.h"
#include "rotary_export.h"

namespace rotary_export {

// Checks types, shapes and attributes (not the outputs) and fills all of `params` but the output
// pointers. Returns false with a message.
bool CheckInputs(const RotaryExportCall& call, RotaryParams* params, Message* message);

// Checks that every position that the rows use is in [0, table_rows). To be called before anything
// is written: the kernel relies on it.
bool CheckPositions(const RotaryParams& params, Message* message);

// Checks the outputs against their inputs and completes `params`.
bool CheckOutputs(const RotaryExportCall& call, RotaryParams* params, Message* message);

// Sets the strides of a contiguous tensor.
void SetContiguous(RotaryExportTensor* tensor);

}  // namespace rotary_export

#endif  // ROTARY_EXPORT_KERNEL_INPUT_CHECKS_H_
