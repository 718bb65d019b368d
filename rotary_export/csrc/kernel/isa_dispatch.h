// The choice of an instruction set, made once, when the library is loaded.
#ifndef ROTARY_EXPORT_KERNEL_ISA_DISPATCH_H_
#define ROTARY_EXPORT_KERNEL_ISA_DISPATCH_H_

#include "kernel/message.h"
#include "kernel/rotary_kernel.h"

namespace rotary_export {

struct Selection {
  const char* name;                // Null if ROTARY_EXPORT_ISA asks for what can't be had.
  RotateRowsFunction rotate_rows;  // Null likewise.
  RotateRowsFunction rotate_few;   // For calls that are over at once.
  int64_t large_bytes;             // Outputs of this size are large.
  Message problem;                 // Says why.
};

const Selection& SelectedInstructionSet();

int64_t OutputBytes(const RotaryParams& params);

// Returns what is to be called for so many rows, and sets params->large: whether the outputs had
// better be written past the cache.
RotateRowsFunction ChooseRotation(RotaryParams* params);

}  // namespace rotary_export

#endif  // ROTARY_EXPORT_KERNEL_ISA_DISPATCH_H_
