#include "message.h"

#include <cinttypes>
#include <cstdarg>
#include <cstdio>
#include <cstring>

namespace rotary_export {
namespace {

__attribute__((format(printf, 2, 3))) void Append(ShortText* to, const char* format, ...) {
  const size_t used = std::strlen(to->text);
  va_list values;
  va_start(values, format);
  std::vsnprintf(to->text + used, sizeof to->text - used, format, values);
  va_end(values);
}

}  // namespace

bool Fail(Message* message, const char* format, ...) {
  va_list values;
  va_start(values, format);
  std::vsnprintf(message->text, sizeof message->text, format, values);
  va_end(values);
  return false;
}

ShortText FormatDims(const int64_t* dims, int rank) {
  ShortText tuple = {"("};
  for (int i = 0; i < rank && i < ROTARY_EXPORT_MAX_RANK; ++i) {
    Append(&tuple, "%s%" PRId64, i == 0 ? "" : ", ", dims[i]);
  }
  Append(&tuple, rank > ROTARY_EXPORT_MAX_RANK ? ", ...)" : rank == 1 ? ",)" : ")");
  return tuple;
}

ShortText FormatShape(const RotaryExportTensor& tensor) {
  return FormatDims(tensor.shape, tensor.rank);
}

ShortText FormatTypes(const RotaryExportType* types, int count) {
  ShortText choice = {""};
  for (int i = 0; i < count; ++i) {
    const char* separator = i == 0 ? "" : i == count - 1 ? " or " : ", ";
    Append(&choice, "%s%s", separator, TypeName(types[i]));
  }
  return choice;
}

}  // namespace rotary_export
