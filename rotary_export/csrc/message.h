// An error sentence in a fixed buffer: no allocation and no exception, so nothing can cross the C
// boundary. Shapes and types are written as in Python, since the sentences are the same there.
#ifndef ROTARY_EXPORT_MESSAGE_H_
#define ROTARY_EXPORT_MESSAGE_H_

#include <cstdint>

#include "kernel/element_types.h"

namespace rotary_export {

struct Message {
  Message() { text[0] = '\0'; }  // Only the first byte: every call of the op constructs one.
  char text[1024];
};

// Formats the sentence and returns false, so that a check can `return Fail(...)`.
__attribute__((format(printf, 2, 3))) bool Fail(Message* message, const char* format, ...);

struct ShortText {
  char text[256];
};

// A tuple: "(2, 3)", "(5,)", "()".
ShortText FormatDims(const int64_t* dims, int rank);
ShortText FormatShape(const RotaryExportTensor& tensor);

// A choice: "float32", "float16 or float32", "float32, float16 or float64".
ShortText FormatTypes(const RotaryExportType* types, int count);

}  // namespace rotary_export

#endif  // ROTARY_EXPORT_MESSAGE_H_
