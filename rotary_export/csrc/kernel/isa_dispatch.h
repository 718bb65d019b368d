// Chooses an instruction set once, when the library is loaded.
#ifndef ROTARY_EXPORT_KERNEL_ISA_DISPATCH_H_
#define ROTARY_EXPORT_KERNEL_ISA_DISPATCH_H_

#include "kernel/rotary_kernel.h"
#include "message.h"

namespace rotary_export {

struct Selection {
  const char* name;                 // Null if ROTARY_EXPORT_ISA names a set that is not available.
  RotateRowsFunction rotate_rows;   // Null likewise.
  RotateRowsFunction rotate_small;  // For calls that take microseconds.
  int64_t streaming_bytes;          // Outputs of at least this size use streaming stores.
  Message problem;                  // Why `name` is null.
};

const Selection& SelectedInstructionSet();

int64_t OutputBytes(const RotaryParams& params);

// Returns the function for outputs of this size, and sets params->use_streaming.
RotateRowsFunction ChooseRotation(RotaryParams* params);

// Rotates part `part` of all rows, split into `parts` parts of about the same size.
void RotatePart(const RotaryParams& params, RotateRowsFunction rotate_rows, int64_t part,
                int64_t parts);

}  // namespace rotary_export

#endif  // ROTARY_EXPORT_KERNEL_ISA_DISPATCH_H_
