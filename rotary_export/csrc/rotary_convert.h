// Element types to and from the type they are computed in: float, or double for double.
//
// Included once per instruction set, hence the anonymous namespace (see rotary_kernel.cc). The half
// types are converted with integers and selects, without branches, so that the loops vectorise and
// every machine gives the same bits. A NaN stays a NaN, subnormals are kept, and rounding is to
// nearest even.
#ifndef ROTARY_EXPORT_ROTARY_CONVERT_H_
#define ROTARY_EXPORT_ROTARY_CONVERT_H_

#include <cstdint>
#include <cstring>

namespace rotary_export {
namespace {

struct Float16 {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

inline uint32_t FloatToBits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline float BitsToFloat(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline float Load(float value) { return value; }
inline double Load(double value) { return value; }
inline float Load(BFloat16 value) { return BitsToFloat(uint32_t{value.bits} << 16); }

inline float Load(Float16 value) {
  const uint32_t sign = uint32_t{value.bits & 0x8000u} << 16;
  const uint32_t magnitude = uint32_t{value.bits & 0x7fffu} << 13;  // Aligned with float's fields.
  const uint32_t normal = magnitude + ((127 - 15) << 23);
  // A subnormal is m * 2^-24: (2^-14 + m * 2^-24) - 2^-14, exact, and without a float subnormal.
  const uint32_t subnormal = FloatToBits(BitsToFloat(magnitude + (113u << 23)) - 0x1p-14f);
  const uint32_t special = magnitude | 0x7f800000u;  // Infinity or NaN.
  const uint32_t finite = magnitude < (1u << 23) ? subnormal : normal;
  return BitsToFloat(sign | (magnitude >= (31u << 23) ? special : finite));
}

inline void Store(float value, float* out) { *out = value; }
inline void Store(double value, double* out) { *out = value; }

inline void Store(float value, BFloat16* out) {
  const uint32_t bits = FloatToBits(value);
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const uint32_t quiet_nan = (bits >> 16) | 0x40;  // Rounding could carry a NaN into infinity.
  out->bits = static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? quiet_nan : rounded);
}

inline void Store(float value, Float16* out) {
  const uint32_t bits = FloatToBits(value);
  const uint32_t sign = (bits >> 16) & 0x8000;
  const uint32_t magnitude = bits & 0x7fffffffu;
  const uint32_t rebiased = magnitude - ((127 - 15) << 23);
  // From 65520 on, the carry of the rounding makes this infinity, as it should.
  const uint32_t normal = (rebiased + 0xfff + ((rebiased >> 13) & 1)) >> 13;
  // The last place of 0.5f is 2^-24, float16's smallest subnormal: the addition rounds for us.
  const uint32_t subnormal = FloatToBits(BitsToFloat(magnitude) + 0.5f) - FloatToBits(0.5f);
  const uint32_t quiet_nan = 0x7e00 | ((magnitude >> 13) & 0x3ff);
  const uint32_t finite = magnitude < (113u << 23) ? subnormal : normal;
  const uint32_t large = magnitude > 0x7f800000u ? quiet_nan : 0x7c00;
  out->bits = static_cast<uint16_t>(sign | (magnitude >= (143u << 23) ? large : finite));
}

}  // namespace
}  // namespace rotary_export

#endif  // ROTARY_EXPORT_ROTARY_CONVERT_H_
