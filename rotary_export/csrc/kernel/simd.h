// Loads, stores and shuffles of vectors: kLanes numbers of type C, computed with +, - and *.
//
// The compiler's vector types do the arithmetic, on every instruction set and down to one lane. The
// sets differ in the widest vector, the conversion of half types and the streaming stores. This
// header is compiled once per instruction set, hence the anonymous namespace (see
// rotary_kernel.cc).
#ifndef ROTARY_EXPORT_KERNEL_SIMD_H_
#define ROTARY_EXPORT_KERNEL_SIMD_H_

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#include "kernel/half_conversion.h"

namespace rotary_export {
namespace {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

constexpr int64_t kLineBytes = 64;  // A cache line.

// The type that elements of type T are computed in.
template <typename T>
using Wide = std::conditional_t<std::is_same_v<T, double>, double, float>;

// How many elements of type T are rotated at once. For bfloat16, as many as fill a vector: they are
// computed in two vectors (EvenOdd).
template <typename T>
constexpr int kWidest =
    kVectorBytes / static_cast<int>(std::is_same_v<T, BFloat16> ? sizeof(T) : sizeof(Wide<T>));

template <typename C, int kLanes>
constexpr bool kIsEvenOdd = kLanes * sizeof(C) > kVectorBytes;

// ---- Non-temporal (streaming) stores: they bypass the cache and need aligned addresses

#if defined(__SSE2__)
constexpr bool kCanStream = true;

template <typename V>
ROTARY_EXPORT_INLINE void StreamBits(const V& v, void* y) {
#if defined(__AVX512F__)
  if constexpr (sizeof v == 64) {
    return _mm512_stream_si512(static_cast<__m512i*>(y), CastBits<__m512i>(v));
  }
#endif
#if defined(__AVX2__)
  if constexpr (sizeof v == 32) {
    return _mm256_stream_si256(static_cast<__m256i*>(y), CastBits<__m256i>(v));
  }
#endif
  if constexpr (sizeof v == 16) {
    return _mm_stream_si128(static_cast<__m128i*>(y), CastBits<__m128i>(v));
  }
  if constexpr (sizeof v == 8) {
    return _mm_stream_si64(static_cast<long long*>(y), CastBits<long long>(v));
  }
}

// Streaming stores are not ordered with other stores. Only after this call may another thread read
// the output.
inline void FinishStreaming() { _mm_sfence(); }
#else
constexpr bool kCanStream = false;
inline void FinishStreaming() {}
#endif

// ---- Loads and stores of any alignment

template <int kLanes, typename T>
ROTARY_EXPORT_INLINE auto LoadVector(const T* x) {
  if constexpr (kIsEvenOdd<Wide<T>, kLanes>) {
    if constexpr (std::is_same_v<T, float>) {  // A table in the order of SplitEvenOdd.
      return EvenOdd<kLanes>{LoadVector<kLanes / 2>(x), LoadVector<kLanes / 2>(x + kLanes / 2)};
    } else {
      HalfBits<kLanes> bits;
      std::memcpy(&bits, x, sizeof bits);
      return WidenEvenOdd<kLanes>(bits);
    }
  } else if constexpr (std::is_floating_point_v<T>) {
    Vector<T, kLanes> v;
    std::memcpy(&v, x, sizeof v);
    return v;
  } else {
    HalfBits<kLanes> bits;
    std::memcpy(&bits, x, sizeof bits);
    return Widen<kLanes>(bits, T());
  }
}

// Whether a store goes through the cache, or bypasses it, which needs an aligned address.
enum class Stores { kPlain, kStreaming };

template <Stores kStores, typename V>
ROTARY_EXPORT_INLINE void StoreBits(const V& v, void* y) {
#if defined(__SSE2__)
  if constexpr (kStores == Stores::kStreaming) return StreamBits(v, y);
#endif
  std::memcpy(y, &v, sizeof v);
}

template <int kLanes, Stores kStores = Stores::kPlain, typename Check = CheckEach, typename V,
          typename T>
ROTARY_EXPORT_INLINE void StoreVector(const V& v, T* y, Check* check = nullptr) {
  if constexpr (std::is_floating_point_v<T>) {
    StoreBits<kStores>(v, y);
  } else if constexpr (kIsEvenOdd<Wide<T>, kLanes>) {
    StoreBits<kStores>(NarrowEvenOdd<kLanes>(v, check), y);
  } else {
    StoreBits<kStores>(Narrow<kLanes>(v, T()), y);
  }
}

// ---- Pairs

// Selects elements by index, of a and b concatenated.
template <typename To, typename From, int... kIndex>
ROTARY_EXPORT_INLINE To Shuffle(const From& a, const From& b,
                                std::integer_sequence<int, kIndex...>) {
#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
  return __builtin_shufflevector(a, b, kIndex...);
#endif
#endif
  constexpr int kLanes = sizeof(From) / sizeof(a[0]);
  return To{(kIndex < kLanes ? a[kIndex % kLanes] : b[kIndex % kLanes])...};
}

template <int... kIndex>
std::integer_sequence<int, (kIndex ^ 1)...> SwappedIndices(std::integer_sequence<int, kIndex...>);
template <int... kIndex>
std::integer_sequence<int, (kIndex / 2)...> DoubledIndices(std::integer_sequence<int, kIndex...>);
template <int kFirst, int... kIndex>
std::integer_sequence<int, (2 * kIndex + kFirst)...> EverySecond(
    std::integer_sequence<int, kIndex...>);

// (a, b, c, d, ...) to (b, a, d, c, ...).
template <int kLanes, typename V>
ROTARY_EXPORT_INLINE V SwapPairs(const V& v) {
  return Shuffle<V>(v, v, decltype(SwappedIndices(std::make_integer_sequence<int, kLanes>()))());
}

template <int kLanes>
ROTARY_EXPORT_INLINE EvenOdd<kLanes> SwapPairs(const EvenOdd<kLanes>& v) {
  return {v.odd, v.even};
}

// (a, b, ...) to the kLanes numbers (a, a, b, b, ...).
template <int kLanes, typename V>
ROTARY_EXPORT_INLINE auto Double(const V& v) {
  using Indices = decltype(DoubledIndices(std::make_integer_sequence<int, kLanes>()));
  return Shuffle<Vector<std::decay_t<decltype(v[0])>, kLanes>>(v, v, Indices());
}

// Reorders each kLanes numbers as EvenOdd stores them: the even ones first.
template <int kLanes>
inline void SplitEvenOdd(float* x, int64_t count) {
  using V = Floats<kLanes / 2>;
  using Indices = std::make_integer_sequence<int, kLanes / 2>;
  for (int64_t i = 0; i + kLanes <= count; i += kLanes) {
    const auto first = LoadVector<kLanes / 2>(x + i);
    const auto second = LoadVector<kLanes / 2>(x + i + kLanes / 2);
    StoreVector<kLanes / 2>(Shuffle<V>(first, second, decltype(EverySecond<0>(Indices()))()),
                            x + i);
    StoreVector<kLanes / 2>(Shuffle<V>(first, second, decltype(EverySecond<1>(Indices()))()),
                            x + i + kLanes / 2);
  }
}

// ---- Copies

template <int kBytes = kVectorBytes>
inline void CopyBytes(const char* from, char* to, int64_t count) {
  int64_t i = 0;
  for (; i + kBytes <= count; i += kBytes) std::memcpy(to + i, from + i, kBytes);
  if constexpr (kBytes > 1) {
    if (i < count) CopyBytes<kBytes / 2>(from + i, to + i, count - i);
  }
}

// Copies up to the last whole cache line of the output, whole lines with streaming stores. Returns
// how many bytes it copied.
inline int64_t StreamLines(const char* from, char* to, int64_t count) {
  const auto past_line = static_cast<int64_t>(reinterpret_cast<uintptr_t>(to) % kLineBytes);
  int64_t i = past_line == 0 ? 0 : kLineBytes - past_line;
  if (i > count) return 0;
  CopyBytes(from, to, i);
  for (; i + kLineBytes <= count; i += kLineBytes) {
    for (int64_t j = 0; j < kLineBytes; j += kVectorBytes) {
      const auto bytes = LoadVector<kVectorBytes / 4>(reinterpret_cast<const float*>(from + i + j));
      StoreBits<Stores::kStreaming>(bytes, to + i + j);
    }
  }
  return i;
}

}  // namespace
}  // namespace rotary_export

#endif  // ROTARY_EXPORT_KERNEL_SIMD_H_
