// An error sentence in a fixed buffer: no allocation, no exception, hence nothing that could cross
// the C boundary. Shapes and types are spelled as Python does, for the sentences are the same
// there.
#ifndef ROTARY_EXPORT_KERNEL_MESSAGE_H_
#define ROTARY_EXPORT_KERNEL_MESSAGE_H_

#include <cstdint>

#include "rotary_export.h"

namespace rotary_export {

struct Message {
  Message() { text[0] = '\0'; }  // Not all of it: every call of the op has one.
  char text[1024];
};

// Formats the sentence and returns false, so that a check can `return Fail(...)`.
__attribute__((format(printf, 2, 3))) bool Fail(Message* message, const char* format, ...);

// A tuple: "(2, 3)", "(5,)", "()".
struct ShapeText {
  char text[256];
};

ShapeText FormatDims(const int64_t* dims, int rank);
ShapeText FormatShape(const RotaryExportTensor& tensor);

const char* TypeName(int32_t type);

}  // namespace rotary_export

#endif  // ROTARY_EXPORT_KERNEL_MESSAGE_H_
