// The element types and their pairs, listed once for the kernels, the checks, ONNX Runtime and
// CUDA.
//
// The constants are those of rotary_export.h. They have ONNX's numbers, hence ONNX Runtime's.
// rotary_kernel.cc includes this header once per instruction set, so it defines no function.
#ifndef ROTARY_EXPORT_KERNEL_ELEMENT_TYPES_H_
#define ROTARY_EXPORT_KERNEL_ELEMENT_TYPES_H_

#include <cstdint>

#include "rotary_export.h"

namespace rotary_export {

struct Float16 {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};
using Float32 = float;
using Float64 = double;
using Int64 = int64_t;

// The C++ type, its constant, its name in messages (the same as in Python).
#define ROTARY_EXPORT_ELEMENT_TYPES(TYPE)            \
  TYPE(Float32, ROTARY_EXPORT_FLOAT32, "float32")    \
  TYPE(Float16, ROTARY_EXPORT_FLOAT16, "float16")    \
  TYPE(BFloat16, ROTARY_EXPORT_BFLOAT16, "bfloat16") \
  TYPE(Float64, ROTARY_EXPORT_FLOAT64, "float64")    \
  TYPE(Int64, ROTARY_EXPORT_INT64, "int64")

// The pairs that have kernels: the type of X, key and the outputs; the type of the tables.
// TYPE_PAIRS in rotary_export/op/spec.py is the same list in the same order.
#define ROTARY_EXPORT_TYPE_PAIRS(PAIR) \
  PAIR(Float32, Float32)               \
  PAIR(Float16, Float16)               \
  PAIR(Float16, Float32)               \
  PAIR(BFloat16, BFloat16)             \
  PAIR(BFloat16, Float32)              \
  PAIR(Float64, Float64)               \
  PAIR(Float64, Float32)

template <typename T>
struct ElementTypeOf;
#define ROTARY_EXPORT_ELEMENT_TYPE_OF(T, constant, name) \
  template <>                                            \
  struct ElementTypeOf<T> {                              \
    static constexpr RotaryExportType kValue = constant; \
  };
ROTARY_EXPORT_ELEMENT_TYPES(ROTARY_EXPORT_ELEMENT_TYPE_OF)
#undef ROTARY_EXPORT_ELEMENT_TYPE_OF

struct TypePair {
  RotaryExportType x_type;
  RotaryExportType table_type;
};
#define ROTARY_EXPORT_TYPE_PAIR(T, Table) {ElementTypeOf<T>::kValue, ElementTypeOf<Table>::kValue},
constexpr TypePair kTypePairs[] = {ROTARY_EXPORT_TYPE_PAIRS(ROTARY_EXPORT_TYPE_PAIR)};
#undef ROTARY_EXPORT_TYPE_PAIR
constexpr int kTypePairCount = sizeof kTypePairs / sizeof kTypePairs[0];

// Bytes of one element; 0 for a type that is not listed above.
int64_t SizeOf(int32_t type);

// The name as in Python; "an unknown type" for a type that is not listed above.
const char* TypeName(int32_t type);

}  // namespace rotary_export

#endif  // ROTARY_EXPORT_KERNEL_ELEMENT_TYPES_H_
