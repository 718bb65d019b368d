// The emulated GPU's memory policy, which checks each access. Only cuda_emulator.cc includes it.
#ifndef ROTARY_EXPORT_TESTS_CUDA_EMULATOR_MEMORY_H_
#define ROTARY_EXPORT_TESTS_CUDA_EMULATOR_MEMORY_H_

#include <cmath>
#include <cstring>
#include <vector>

#include "cuda/rotate_thread.h"
#include "message.h"

namespace rotary_export {
namespace {

// ---- memory

struct Region {
  const unsigned char* begin;
  size_t size;
  std::vector<unsigned char> writes;  // How often each byte was written; empty: read only.
};

struct Emulator {
  bool is_checked = false;  // Not in calls from ONNX Runtime: their regions are unknown.
  std::vector<Region> regions;
  Message problem;
  int64_t launches = 0;
  int64_t vector_launches = 0;
  int64_t largest_grid = 0;
  int capture_status = 0;
  int launch_error = 0;
};
Emulator emulator;

void Complain(const char* what, const void* data, size_t size) {
  if (emulator.problem.text[0] == '\0') {
    Fail(&emulator.problem, "%s of %zu bytes at address %% 16 = %d", what, size,
         static_cast<int>(reinterpret_cast<uintptr_t>(data) % 16));
  }
}

Region* FindRegion(const void* data, size_t size, bool is_written) {
  const auto* begin = static_cast<const unsigned char*>(data);
  for (Region& region : emulator.regions) {
    if (is_written && region.writes.empty()) continue;
    if (begin >= region.begin && begin + size <= region.begin + region.size) return &region;
  }
  return nullptr;
}

// Returns whether the access may be made: one outside of the regions could crash the test.
bool CheckAccess(const void* data, size_t size, bool is_written) {
  if (!emulator.is_checked) return true;
  const size_t unit = size % 16 == 0 ? 16 : size;  // Bytes that one instruction moves.
  if (reinterpret_cast<uintptr_t>(data) % unit != 0) Complain("misaligned access", data, size);
  Region* region = FindRegion(data, size, is_written);
  if (region == nullptr) {
    Complain(is_written ? "stray write" : "stray read", data, size);
    return false;
  }
  if (region->writes.empty()) return true;
  const size_t first = static_cast<size_t>(static_cast<const unsigned char*>(data) - region->begin);
  for (size_t i = first; i < first + size; ++i) {
    if (is_written && ++region->writes[i] > 1) Complain("second write", data, size);
    if (!is_written && region->writes[i] > 0) Complain("read after a write", data, size);
  }
  return true;
}

// ---- the memory policy; it converts half types in a slow and obvious way

double HalfToDouble(unsigned bits) {
  const int exponent = static_cast<int>(bits >> 10 & 31);
  const double mantissa = bits & 1023;
  const double sign = bits >> 15 ? -1 : 1;
  if (exponent == 31) return mantissa != 0 ? NAN : sign * INFINITY;
  if (exponent == 0) return sign * std::ldexp(mantissa, -24);
  return sign * std::ldexp(1024 + mantissa, exponent - 25);
}

// Rounds to a type with `digits` binary digits, last place 2^lowest and largest value `largest`.
double Round(double value, int digits, int lowest, double largest) {
  if (!std::isfinite(value) || value == 0) return value;
  int exponent = 0;
  std::frexp(value, &exponent);
  const int unit = exponent - digits < lowest ? lowest : exponent - digits;
  const double rounded = std::ldexp(std::nearbyint(std::ldexp(value, -unit)), unit);
  return std::fabs(rounded) > largest ? std::copysign(INFINITY, value) : rounded;
}

struct CheckedMemory {
  template <typename T, int kWidth>
  void Read(const T* from, T (&to)[kWidth]) const {
    std::memset(static_cast<void*>(to), 0, sizeof to);
    if (CheckAccess(from, sizeof to, false)) std::memcpy(to, from, sizeof to);
  }
  template <typename T, int kWidth>
  void ReadTable(const T* from, T (&to)[kWidth]) const {
    Read(from, to);
  }
  template <typename T, int kWidth>
  void Write(const T (&from)[kWidth], T* to) const {
    if (CheckAccess(to, sizeof from, true)) std::memcpy(to, from, sizeof from);
  }

  float Widen(float value) const { return value; }
  double Widen(double value) const { return value; }
  float Widen(Float16 value) const { return static_cast<float>(HalfToDouble(value.bits)); }
  float Widen(BFloat16 value) const {
    const uint32_t bits = uint32_t{value.bits} << 16;
    float wide;
    std::memcpy(&wide, &bits, sizeof wide);
    return wide;
  }
  void Narrow(float value, float* to) const { *to = value; }
  void Narrow(double value, double* to) const { *to = value; }
  void Narrow(float value, BFloat16* to) const {
    const float rounded = static_cast<float>(Round(value, 8, -133, 0x1.fep127));
    uint32_t bits;
    std::memcpy(&bits, &rounded, sizeof bits);
    to->bits = static_cast<uint16_t>(std::isnan(rounded) ? 0x7fff : bits >> 16);
  }
  void Narrow(float value, Float16* to) const {
    const double rounded = std::fabs(Round(value, 11, -24, 65504));
    const unsigned sign = std::signbit(value) ? 0x8000 : 0;
    int exponent = 0;
    std::frexp(rounded, &exponent);
    unsigned bits = 0;
    if (std::isnan(value)) {
      bits = 0x7fff;
    } else if (std::isinf(rounded)) {
      bits = 0x7c00;
    } else if (rounded < 0x1p-14) {
      bits = static_cast<unsigned>(std::ldexp(rounded, 24));
    } else {
      bits = static_cast<unsigned>(std::ldexp(rounded, 11 - exponent)) - 1024 +
             (static_cast<unsigned>(exponent + 14) << 10);
    }
    to->bits = static_cast<uint16_t>(std::isnan(value) ? bits : sign | bits);
  }
};

}  // namespace
}  // namespace rotary_export

#endif  // ROTARY_EXPORT_TESTS_CUDA_EMULATOR_MEMORY_H_
