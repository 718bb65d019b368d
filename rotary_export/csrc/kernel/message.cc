#include "kernel/message.h"

#include <cinttypes>
#include <cstdarg>
#include <cstdio>

namespace rotary_export {

bool Fail(Message* message, const char* format, ...) {
  va_list values;
  va_start(values, format);
  std::vsnprintf(message->text, sizeof message->text, format, values);
  va_end(values);
  return false;
}

ShapeText FormatDims(const int64_t* dims, int rank) {
  ShapeText shape;
  size_t used = 0;
  const auto append = [&](const char* format, int64_t value) {
    const int added = std::snprintf(shape.text + used, sizeof shape.text - used, format, value);
    if (added > 0) used += static_cast<size_t>(added);
  };
  append("(", 0);
  for (int i = 0; i < rank && i < ROTARY_EXPORT_MAX_RANK; ++i) {
    append(i == 0 ? "%" PRId64 : ", %" PRId64, dims[i]);
  }
  append(rank > ROTARY_EXPORT_MAX_RANK ? ", ...)" : rank == 1 ? ",)" : ")", 0);
  return shape;
}

ShapeText FormatShape(const RotaryExportTensor& tensor) {
  return FormatDims(tensor.shape, tensor.rank);
}

const char* TypeName(int32_t type) {
  switch (type) {
    case ROTARY_EXPORT_FLOAT32:
      return "float32";
    case ROTARY_EXPORT_FLOAT16:
      return "float16";
    case ROTARY_EXPORT_BFLOAT16:
      return "bfloat16";
    case ROTARY_EXPORT_FLOAT64:
      return "float64";
    case ROTARY_EXPORT_INT64:
      return "int64";
    default:
      return "an unknown type";
  }
}

}  // namespace rotary_export
