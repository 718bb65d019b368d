// Vectors of floats, and the conversion of the half types to and from them.
//
// The compiler's vector types have +, -, * and comparisons lane by lane. They work on every
// instruction set, for any power of two of lanes, one included. This header is compiled once per
// instruction set, hence the anonymous namespace (see rotary_kernel.cc).
//
// The processor's instructions convert the half types where they exist, else integer operations and
// selects do. Both give the same bits: a NaN stays a NaN, subnormals are kept, rounding is to
// nearest even.
#ifndef ROTARY_EXPORT_KERNEL_HALF_CONVERSION_H_
#define ROTARY_EXPORT_KERNEL_HALF_CONVERSION_H_

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "kernel/element_types.h"

#if defined(__SSE2__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"  // GCC 12's own header (its bug 105593).
#if !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>
#pragma GCC diagnostic pop
#endif

// For everything inside the loops. Otherwise the compiler decides, differently after each change,
// and one call in a loop costs up to a fifth of its speed.
#define ROTARY_EXPORT_INLINE inline __attribute__((always_inline))

namespace rotary_export {
namespace {

template <typename C, int kLanes>
struct VectorType {
  typedef C Type __attribute__((vector_size(sizeof(C) * kLanes)));
};
template <typename C, int kLanes>
using Vector = typename VectorType<C, kLanes>::Type;
template <int kLanes>
using Floats = Vector<float, kLanes>;
template <int kLanes>
using Ints = Vector<int32_t, kLanes>;  // Signed: what SSE2 can compare.
template <int kLanes>
using HalfBits = Vector<uint16_t, kLanes>;

template <typename To, typename From>
ROTARY_EXPORT_INLINE To CastBits(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

// __builtin_convertvector, except for vectors that GCC 12 converts in several instructions.
template <int kLanes>
ROTARY_EXPORT_INLINE Ints<kLanes> ExtendBits(const HalfBits<kLanes>& bits) {
#if defined(__AVX512F__)
  if constexpr (kLanes == 16) {
    return CastBits<Ints<16>>(_mm512_cvtepu16_epi32(CastBits<__m256i>(bits)));
  }
#endif
  return __builtin_convertvector(bits, Ints<kLanes>);
}

// Requires lanes of at most 0xffff.
template <int kLanes>
ROTARY_EXPORT_INLINE HalfBits<kLanes> TruncateBits(const Ints<kLanes>& bits) {
#if defined(__AVX512F__)
  if constexpr (kLanes == 16) {
    return CastBits<HalfBits<16>>(_mm512_cvtepi32_epi16(CastBits<__m512i>(bits)));
  }
#endif
#if defined(__AVX2__)
  if constexpr (kLanes == 8) {
    const __m256i wide = CastBits<__m256i>(bits);
    const __m128i high = _mm256_extracti128_si256(wide, 1);
    return CastBits<HalfBits<8>>(_mm_packus_epi32(_mm256_castsi256_si128(wide), high));
  }
#endif
  return __builtin_convertvector(bits, HalfBits<kLanes>);
}

template <int kLanes>
ROTARY_EXPORT_INLINE Floats<kLanes> Widen(const HalfBits<kLanes>& bits, BFloat16) {
  return CastBits<Floats<kLanes>>(ExtendBits<kLanes>(bits) << 16);
}

// Rounds floats to bfloat16, the upper half of each result.
template <int kLanes>
ROTARY_EXPORT_INLINE Vector<uint32_t, kLanes> RoundToUpper(const Floats<kLanes>& value) {
  const auto bits = CastBits<Vector<uint32_t, kLanes>>(value);  // Unsigned: the sum may carry.
  const auto rounded = bits + 0x7fff + ((bits >> 16) & 1);
  const auto quiet_nan = bits | 0x400000;  // Rounding could carry a NaN into infinity.
  return value != value ? quiet_nan : rounded;
}

template <int kLanes>
ROTARY_EXPORT_INLINE HalfBits<kLanes> Narrow(const Floats<kLanes>& value, BFloat16) {
  return TruncateBits<kLanes>(CastBits<Ints<kLanes>>(RoundToUpper<kLanes>(value) >> 16));
}

// kLanes elements as two vectors: those with even index and those with odd index. A bfloat16 is the
// upper half of a float, so a shift and a mask separate two neighbours.
template <int kLanes>
struct EvenOdd {
  Floats<kLanes / 2> even;
  Floats<kLanes / 2> odd;
};

template <int kLanes>
ROTARY_EXPORT_INLINE EvenOdd<kLanes> operator*(const EvenOdd<kLanes>& a, const EvenOdd<kLanes>& b) {
  return {a.even * b.even, a.odd * b.odd};
}
template <int kLanes>
ROTARY_EXPORT_INLINE EvenOdd<kLanes> operator+(const EvenOdd<kLanes>& a, const EvenOdd<kLanes>& b) {
  return {a.even + b.even, a.odd + b.odd};
}
template <int kLanes>
ROTARY_EXPORT_INLINE EvenOdd<kLanes> operator-(const EvenOdd<kLanes>& a, const EvenOdd<kLanes>& b) {
  return {a.even - b.even, a.odd - b.odd};
}

template <int kLanes>
ROTARY_EXPORT_INLINE EvenOdd<kLanes> WidenEvenOdd(const HalfBits<kLanes>& bits) {
  const auto both = CastBits<Vector<uint32_t, kLanes / 2>>(bits);
  return {CastBits<Floats<kLanes / 2>>(both << 16),
          CastBits<Floats<kLanes / 2>>(both & 0xffff0000)};
}

// Whether two vectors may hold numbers that the fast conversion in NarrowEvenOdd gets wrong:
// subnormals, which the processor's instruction flushes to 0, or, without that instruction, NaNs.
template <int kLanes>
ROTARY_EXPORT_INLINE bool MayHoldRare([[maybe_unused]] const Floats<kLanes>& a,
                                      [[maybe_unused]] const Floats<kLanes>& b) {
#if defined(__AVX512BF16__)
  if constexpr (kLanes == 16) {
    constexpr int kSubnormal = 0x20;
    return (_mm512_fpclass_ps_mask(CastBits<__m512>(a), kSubnormal) |
            _mm512_fpclass_ps_mask(CastBits<__m512>(b), kSubnormal)) != 0;
  }
#elif defined(__AVX512F__)
  if constexpr (kLanes == 16) {
    return _mm512_cmp_ps_mask(CastBits<__m512>(a), CastBits<__m512>(b), _CMP_UNORD_Q) != 0;
  }
#endif
#if defined(__AVX2__)
  if constexpr (kLanes == 8) {
    const __m256 nans = _mm256_cmp_ps(CastBits<__m256>(a), CastBits<__m256>(b), _CMP_UNORD_Q);
    return _mm256_movemask_ps(nans) != 0;
  }
#endif
#if defined(__SSE2__)
  if constexpr (kLanes == 4) {
    return _mm_movemask_ps(_mm_cmpunord_ps(CastBits<__m128>(a), CastBits<__m128>(b))) != 0;
  }
#endif
  return true;
}

// When to look for such numbers: at each store, or once after a loop, which is repeated if it met
// any. A branch at each store costs bfloat16 a sixth of its speed with streaming stores.
struct CheckEach {};
struct CheckLater {
  uint32_t are_normal = 0xffffffff;  // By lane, whether no result was 0 or subnormal.
};
#if defined(__AVX512BF16__)
template <typename T>
constexpr bool kCanCheckLater = std::is_same_v<T, BFloat16>;
#else
template <typename T>
constexpr bool kCanCheckLater = false;
#endif

template <int kLanes>
ROTARY_EXPORT_INLINE HalfBits<kLanes> NarrowRare(const EvenOdd<kLanes>& value) {
  const auto even = RoundToUpper<kLanes / 2>(value.even);
  const auto odd = RoundToUpper<kLanes / 2>(value.odd);
  return CastBits<HalfBits<kLanes>>((even >> 16) | (odd & 0xffff0000));
}

template <int kLanes, typename Check>
ROTARY_EXPORT_INLINE HalfBits<kLanes> NarrowEvenOdd(const EvenOdd<kLanes>& value,
                                                    [[maybe_unused]] Check* check) {
#if defined(__AVX512BF16__)
  if constexpr (kLanes == 32) {
    constexpr HalfBits<32> kInTurns = {0,  16, 1,  17, 2,  18, 3,  19, 4,  20, 5,
                                       21, 6,  22, 7,  23, 8,  24, 9,  25, 10, 26,
                                       11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    const auto bits = CastBits<__m512i>(
        _mm512_cvtne2ps_pbh(CastBits<__m512>(value.odd), CastBits<__m512>(value.even)));
    const __m512i exponent = _mm512_set1_epi16(0x7f80);
    if constexpr (std::is_same_v<Check, CheckLater>) {
      check->are_normal = _mm512_mask_test_epi16_mask(check->are_normal, bits, exponent);
    } else if (__builtin_expect(_mm512_testn_epi16_mask(bits, exponent) != 0, false)) {
      if (MayHoldRare<kLanes / 2>(value.even, value.odd)) return NarrowRare<kLanes>(value);
    }
    return CastBits<HalfBits<kLanes>>(_mm512_permutexvar_epi16(CastBits<__m512i>(kInTurns), bits));
  }
#endif
  if (__builtin_expect(MayHoldRare<kLanes / 2>(value.even, value.odd), false)) {
    return NarrowRare<kLanes>(value);
  }
  // NarrowRare without the NaNs: rounds after combining, in half the instructions.
  using U = Vector<uint32_t, kLanes / 2>;
  const U even = CastBits<U>(value.even);
  const U odd = CastBits<U>(value.odd);
  const auto upper = CastBits<HalfBits<kLanes>>((even >> 16) | (odd & 0xffff0000));
  const auto lower = CastBits<HalfBits<kLanes>>((even & 0xffff) | (odd << 16));
  const auto up = (lower | (upper & 1)) > 0x8000;  // -1 if true: more than half, or half and odd.
  return upper - CastBits<HalfBits<kLanes>>(up);
}

template <int kLanes>
ROTARY_EXPORT_INLINE Floats<kLanes> Widen(const HalfBits<kLanes>& bits, Float16) {
#if defined(__AVX512F__)
  if constexpr (kLanes == 16) {
    return CastBits<Floats<16>>(_mm512_cvtph_ps(CastBits<__m256i>(bits)));
  }
#endif
#if defined(__F16C__)
  if constexpr (kLanes == 8) {
    return CastBits<Floats<8>>(_mm256_cvtph_ps(CastBits<__m128i>(bits)));
  }
#endif
  using F = Floats<kLanes>;
  using I = Ints<kLanes>;
  const I wide = ExtendBits<kLanes>(bits);
  const I sign = (wide & 0x8000) << 16;
  const I magnitude = (wide & 0x7fff) << 13;  // Aligned with float's fields.
  const I normal = magnitude + ((127 - 15) << 23);
  // A subnormal is m * 2^-24: (2^-14 + m * 2^-24) - 2^-14, exact, and without a float subnormal.
  const I subnormal = CastBits<I>(CastBits<F>(magnitude + (113 << 23)) - 0x1p-14f);
  const I special = magnitude | 0x7f800000;  // Infinity or NaN.
  const I finite = magnitude < (1 << 23) ? subnormal : normal;
  return CastBits<F>(sign | (magnitude >= (31 << 23) ? special : finite));
}

template <int kLanes>
ROTARY_EXPORT_INLINE HalfBits<kLanes> Narrow(const Floats<kLanes>& value, Float16) {
#if defined(__AVX512F__)
  if constexpr (kLanes == 16) {
    const __m512 wide = CastBits<__m512>(value);
    return CastBits<HalfBits<16>>(_mm512_cvtps_ph(wide, _MM_FROUND_TO_NEAREST_INT));
  }
#endif
#if defined(__F16C__)
  if constexpr (kLanes == 8) {
    const __m256 wide = CastBits<__m256>(value);
    return CastBits<HalfBits<8>>(_mm256_cvtps_ph(wide, _MM_FROUND_TO_NEAREST_INT));
  }
#endif
  using F = Floats<kLanes>;
  using I = Ints<kLanes>;
  const I bits = CastBits<I>(value);
  const I sign = (bits >> 16) & 0x8000;
  const I magnitude = bits & 0x7fffffff;
  const I rebiased = magnitude - ((127 - 15) << 23);
  // From 65520 on, the carry of the rounding makes infinity, as it must.
  const I normal = (rebiased + 0xfff + ((rebiased >> 13) & 1)) >> 13;
  // The last place of 0.5f is 2^-24, float16's smallest subnormal, so the addition rounds.
  const I subnormal = CastBits<I>(CastBits<F>(magnitude) + 0.5f) - 0x3f000000;
  const I quiet_nan = 0x7e00 | ((magnitude >> 13) & 0x3ff);
  const I finite = magnitude < (113 << 23) ? subnormal : normal;
  const I special = magnitude > 0x7f800000 ? quiet_nan : I{} + 0x7c00;
  return TruncateBits<kLanes>(sign | (magnitude >= (143 << 23) ? special : finite));
}

}  // namespace
}  // namespace rotary_export

#endif  // ROTARY_EXPORT_KERNEL_HALF_CONVERSION_H_
