// The CUDA kernels: rotate_thread.h with a GPU's memory. Compiled to device code alone (a fatbin),
// which cuda_driver.cc embeds. launch_rotation.cc finds the kernels by the names below.
#include <type_traits>

#include "cuda/rotate_thread.h"

namespace rotary_export {
namespace cuda {
namespace {

// The memory policy of a GPU. Moves `kWidth` elements in pieces of up to 16 bytes. X may be Y's
// memory, so Read must not use the read-only cache.
struct DeviceMemory {
  template <typename T, int kWidth>
  __device__ __forceinline__ void Read(const T* from, T (&to)[kWidth]) const {
    constexpr int kBytes = sizeof to;
    if constexpr (kBytes % 16 == 0) {
      Pieces<uint4, kBytes / 16> pieces;
#pragma unroll
      for (int i = 0; i < kBytes / 16; ++i) {
        pieces.piece[i] = reinterpret_cast<const uint4*>(from)[i];
      }
      memcpy(to, &pieces, kBytes);
    } else {
#pragma unroll
      for (int i = 0; i < kWidth; ++i) to[i] = from[i];
    }
  }

  template <typename T, int kWidth>
  __device__ __forceinline__ void Write(const T (&from)[kWidth], T* to) const {
    constexpr int kBytes = sizeof from;
    if constexpr (kBytes % 16 == 0) {
      Pieces<uint4, kBytes / 16> pieces;
      memcpy(&pieces, from, kBytes);
#pragma unroll
      for (int i = 0; i < kBytes / 16; ++i) {
        // nvcc splits a plain assignment into four stores if it cannot prove the alignment.
        __stwb(reinterpret_cast<uint4*>(to) + i, pieces.piece[i]);
      }
    } else {
#pragma unroll
      for (int i = 0; i < kWidth; ++i) to[i] = from[i];
    }
  }

  // Tables are never written, so heads that share them read through the read-only cache.
  template <typename T, int kWidth>
  __device__ __forceinline__ void ReadTable(const T* from, T (&to)[kWidth]) const {
    constexpr int kBytes = sizeof to;
    using Piece = PieceOf<kBytes % 16 == 0 ? 16 : kBytes>;
    constexpr int kPieces = kBytes / sizeof(Piece);
    Pieces<Piece, kPieces> pieces;
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {
      pieces.piece[i] = __ldg(reinterpret_cast<const Piece*>(from) + i);
    }
    memcpy(to, &pieces, kBytes);
  }

  // One instruction each, without CUDA's headers for half types. Rounding is to nearest even,
  // subnormals are kept, a NaN stays a NaN.
  __device__ __forceinline__ float Widen(float value) const { return value; }
  __device__ __forceinline__ double Widen(double value) const { return value; }
  __device__ __forceinline__ float Widen(BFloat16 value) const {
    return __uint_as_float(uint32_t{value.bits} << 16);
  }
  __device__ __forceinline__ float Widen(Float16 value) const {
    float wide;
    asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(value.bits));
    return wide;
  }
  __device__ __forceinline__ void Narrow(float value, float* to) const { *to = value; }
  __device__ __forceinline__ void Narrow(double value, double* to) const { *to = value; }
  __device__ __forceinline__ void Narrow(float value, BFloat16* to) const {
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(to->bits) : "f"(value));
  }
  __device__ __forceinline__ void Narrow(float value, Float16* to) const {
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(to->bits) : "f"(value));
  }

 private:
  template <typename Piece, int kCount>
  struct Pieces {
    Piece piece[kCount];
  };
  template <bool kFirst, typename First, typename Second>
  using Select = typename std::conditional<kFirst, First, Second>::type;
  template <int kBytes>
  using PieceOf = Select<kBytes == 16, uint4,
                         Select<kBytes == 8, uint2, Select<kBytes == 4, uint32_t, uint16_t>>>;
};

template <typename T, typename Table, int kWidth>
__device__ __forceinline__ void Rotate(const Launch& launch) {
  const ThreadIndex index = {blockIdx.x, blockIdx.y, blockIdx.z, threadIdx.x, threadIdx.y};
  RotateThread<T, Table, kWidth>(launch, index, DeviceMemory());
}

}  // namespace
}  // namespace cuda
}  // namespace rotary_export

// __grid_constant__: threads read the argument in place; it is not copied to local memory.
#define ROTARY_EXPORT_KERNEL(name, T, Table, width)                                \
  extern "C" __global__ void __launch_bounds__(rotary_export::kThreadsPerBlock, 3) \
      name(const __grid_constant__ rotary_export::Launch launch) {                 \
    using namespace rotary_export;                                                 \
    cuda::Rotate<T, Table, width>(launch);                                         \
  }
#define ROTARY_EXPORT_KERNELS(T, Table)                                        \
  ROTARY_EXPORT_KERNEL(Rotate##T##Table##Vector, T, Table,                     \
                       rotary_export::kVectorBytes / sizeof(rotary_export::T)) \
  ROTARY_EXPORT_KERNEL(Rotate##T##Table##Scalar, T, Table, 1)

ROTARY_EXPORT_TYPE_PAIRS(ROTARY_EXPORT_KERNELS)
