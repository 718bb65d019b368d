// The choice of an instruction set, made once, when the library is loaded.
#ifndef ROTARY_EXPORT_ROTARY_DISPATCH_H_
#define ROTARY_EXPORT_ROTARY_DISPATCH_H_

#include "message.h"
#include "rotary_kernel.h"

namespace rotary_export {

struct Selection {
  const char* name;                // Null if ROTARY_EXPORT_ISA asks for what can't be had.
  RotateRowsFunction rotate_rows;  // Null likewise.
  Message problem;                 // Says why.
};

const Selection& SelectedInstructionSet();

}  // namespace rotary_export

#endif  // ROTARY_EXPORT_ROTARY_DISPATCH_H_
