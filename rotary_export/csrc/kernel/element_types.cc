#include "kernel/element_types.h"

namespace rotary_export {

int64_t SizeOf(int32_t type) {
  switch (type) {
#define ROTARY_EXPORT_SIZE(T, constant, name) \
  case constant:                              \
    return int64_t{sizeof(T)};
    ROTARY_EXPORT_ELEMENT_TYPES(ROTARY_EXPORT_SIZE)
#undef ROTARY_EXPORT_SIZE
    default:
      return 0;
  }
}

const char* TypeName(int32_t type) {
  switch (type) {
#define ROTARY_EXPORT_NAME(T, constant, name) \
  case constant:                              \
    return name;
    ROTARY_EXPORT_ELEMENT_TYPES(ROTARY_EXPORT_NAME)
#undef ROTARY_EXPORT_NAME
    default:
      return "an unknown type";
  }
}

}  // namespace rotary_export
