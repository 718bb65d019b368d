// What one CUDA thread does: which channels of which heads are its own, and their rotation. Host
// compilers take it too, so that tests/helpers/cuda_emulator.cc can run every thread of every block
// on the CPU.
//
// A Machine is how memory is reached and how the half types are converted: rotary_kernel.cu has the
// GPU's, with 16-byte accesses; the emulator's checks each access.
#ifndef ROTARY_EXPORT_CUDA_THREAD_INDEX_H_
#define ROTARY_EXPORT_CUDA_THREAD_INDEX_H_

#include "cuda/launch_plan.h"

#if defined(__CUDACC__)
#define ROTARY_EXPORT_HOST_DEVICE __host__ __device__ __forceinline__
#define ROTARY_EXPORT_UNROLL _Pragma("unroll")
#define ROTARY_EXPORT_NO_UNROLL _Pragma("unroll 1")
#else
#define ROTARY_EXPORT_HOST_DEVICE inline
#define ROTARY_EXPORT_UNROLL
#define ROTARY_EXPORT_NO_UNROLL
#endif

namespace rotary_export {
namespace cuda {

struct Float16 {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};
using Float32 = float;
using Float64 = double;

struct ThreadIndex {
  uint32_t block_x, block_y, block_z;
  uint32_t thread_x, thread_y;
};

// ---- arithmetic: every operation rounded by itself, as eager PyTorch does; no FMA

#if defined(__CUDA_ARCH__)
__device__ __forceinline__ float Multiply(float a, float b) { return __fmul_rn(a, b); }
__device__ __forceinline__ float Add(float a, float b) { return __fadd_rn(a, b); }
__device__ __forceinline__ float Invert(float a) { return __frcp_rn(a); }
__device__ __forceinline__ double Multiply(double a, double b) { return __dmul_rn(a, b); }
__device__ __forceinline__ double Add(double a, double b) { return __dadd_rn(a, b); }
__device__ __forceinline__ double Invert(double a) { return __drcp_rn(a); }
#else  // Compiled with -ffp-contract=off.
template <typename C>
ROTARY_EXPORT_HOST_DEVICE C Multiply(C a, C b) {
  return a * b;
}
template <typename C>
ROTARY_EXPORT_HOST_DEVICE C Add(C a, C b) {
  return a + b;
}
template <typename C>
ROTARY_EXPORT_HOST_DEVICE C Invert(C a) {
  return C(1) / a;
}
#endif

// Rotates the pair (*a, *b); the order of the operations is that of rotary_kernel.cc.
template <typename C>
ROTARY_EXPORT_HOST_DEVICE void RotatePair(C cos, C sin, bool is_scaled, C scale, C* a, C* b) {
  C a_cos = Multiply(*a, cos);
  C b_sin = Multiply(*b, sin);
  C b_cos = Multiply(*b, cos);
  C a_sin = Multiply(*a, sin);
  if (is_scaled) {
    a_cos = Multiply(a_cos, scale);
    b_sin = Multiply(b_sin, scale);
    b_cos = Multiply(b_cos, scale);
    a_sin = Multiply(a_sin, scale);
  }
  *a = Add(a_cos, -b_sin);
  *b = Add(b_cos, a_sin);
}

// ---- which table row, which heads

// The position of a row of the launch: of the last run that starts at or before it.
ROTARY_EXPORT_HOST_DEVICE int64_t FindPosition(const Launch& launch, uint32_t row) {
  uint32_t low = 0;
  uint32_t high = launch.run_count;
  while (high - low > 1) {
    const uint32_t middle = (low + high) / 2;
    if (launch.run_rows[middle] <= row) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return launch.run_positions[low] + (row - launch.run_rows[low]);
}

struct Place {
  int64_t batch;
  int64_t row;  // Of the batch entry.
};

ROTARY_EXPORT_HOST_DEVICE Place FindPlace(const Launch& launch, uint32_t row, int64_t repeat) {
  if (!launch.has_ids_per_batch) return {repeat, launch.first_row + row};
  const auto from_first = static_cast<uint64_t>(launch.first_row + row);
  const auto seq_len = static_cast<uint64_t>(launch.params.seq_len);
  return {launch.first_batch + static_cast<int64_t>(from_first / seq_len),
          static_cast<int64_t>(from_first % seq_len)};
}

// Some heads of X or of key, at one row.
template <typename T>
struct HeadGroup {
  const T* in;
  T* out;
  int64_t in_stride;  // From head to head.
  int64_t out_stride;
  int64_t count;
  bool is_key;
};

template <typename T>
ROTARY_EXPORT_HOST_DEVICE HeadGroup<T> FindHeads(const Launch& launch, int64_t group, Place place) {
  const bool is_key = group >= launch.query_groups;
  const Heads& heads = is_key ? launch.params.key : launch.params.query;
  const int64_t first = (is_key ? group - launch.query_groups : group) * launch.heads_per_thread;
  const int64_t left = heads.count - first;
  const HeadStrides& from = heads.in_strides;
  const HeadStrides& to = heads.out_strides;
  HeadGroup<T> found;
  found.in = static_cast<const T*>(heads.in) + place.batch * from.batch + first * from.head +
             place.row * from.row;
  found.out =
      static_cast<T*>(heads.out) + place.batch * to.batch + first * to.head + place.row * to.row;
  found.in_stride = from.head;
  found.out_stride = to.head;
  found.count = left < launch.heads_per_thread ? left : launch.heads_per_thread;
  found.is_key = is_key;
  return found;
}

// ---- the work

template <typename Table, int kWidth, typename C, typename Machine>
ROTARY_EXPORT_HOST_DEVICE void LoadTable(const Machine& machine, const void* table, int64_t entry,
                                         C (&to)[kWidth]) {
  Table entries[kWidth];
  machine.ReadTable(static_cast<const Table*>(table) + entry, entries);
  ROTARY_EXPORT_UNROLL
  for (int i = 0; i < kWidth; ++i) to[i] = static_cast<C>(machine.Widen(entries[i]));
}

// Rotates pairs chunk * kWidth and on of each head. The layouts differ only in where the pairs'
// channels are: two vectors, rotary_dim / 2 apart or neighbours.
template <typename T, typename Table, int kWidth, typename Machine>
ROTARY_EXPORT_HOST_DEVICE void RotateChunk(const Launch& launch, const HeadGroup<T>& heads,
                                           int64_t table_row, int64_t chunk,
                                           const Machine& machine) {
  using C = decltype(machine.Widen(T()));
  const RotaryParams& params = launch.params;
  const int64_t half = params.rotary_dim / 2;
  const int64_t pair = chunk * kWidth;
  const int64_t entry = table_row * half + pair;
  const bool is_scaled = params.scale_cache != nullptr;
  C cos[kWidth], sin[kWidth], scale[kWidth] = {};
  LoadTable<Table>(machine, params.cos_cache, entry, cos);
  LoadTable<Table>(machine, params.sin_cache, entry, sin);
  if (is_scaled) {
    LoadTable<Table>(machine, params.scale_cache, entry, scale);
    if (heads.is_key) {
      ROTARY_EXPORT_UNROLL
      for (int i = 0; i < kWidth; ++i) scale[i] = Invert(scale[i]);
    }
  }
  const int64_t first = params.interleaved ? 2 * pair : pair;
  const int64_t apart = params.interleaved ? kWidth : half;
  // Since Y may be X, no head's loads can move above the stores of the one before: unrolling would
  // cost registers and gain nothing.
  const T* in = heads.in + first;
  T* out = heads.out + first;
  ROTARY_EXPORT_NO_UNROLL
  for (int64_t head = 0; head < heads.count; ++head) {
    T low[kWidth], high[kWidth];
    machine.Read(in, low);
    machine.Read(in + apart, high);
    C x[2 * kWidth];
    ROTARY_EXPORT_UNROLL
    for (int i = 0; i < kWidth; ++i) {
      x[i] = machine.Widen(low[i]);
      x[kWidth + i] = machine.Widen(high[i]);
    }
    // Two loops, so that all indices are constants and x stays in registers.
    if (params.interleaved) {
      ROTARY_EXPORT_UNROLL
      for (int i = 0; i < kWidth; ++i) {
        RotatePair(cos[i], sin[i], is_scaled, scale[i], &x[2 * i], &x[2 * i + 1]);
      }
    } else {
      ROTARY_EXPORT_UNROLL
      for (int i = 0; i < kWidth; ++i) {
        RotatePair(cos[i], sin[i], is_scaled, scale[i], &x[i], &x[kWidth + i]);
      }
    }
    ROTARY_EXPORT_UNROLL
    for (int i = 0; i < kWidth; ++i) {
      machine.Narrow(x[i], &low[i]);
      machine.Narrow(x[kWidth + i], &high[i]);
    }
    machine.Write(low, out);
    machine.Write(high, out + apart);
    in += heads.in_stride;
    out += heads.out_stride;
  }
}

// Copies channels past rotary_dim, bit by bit.
template <typename T, int kWidth, typename Machine>
ROTARY_EXPORT_HOST_DEVICE void CopyTail(const HeadGroup<T>& heads, int64_t channel,
                                        const Machine& machine) {
  if (heads.in == heads.out) return;
  ROTARY_EXPORT_NO_UNROLL
  for (int64_t head = 0; head < heads.count; ++head) {
    T values[kWidth];
    machine.Read(heads.in + head * heads.in_stride + channel, values);
    machine.Write(values, heads.out + head * heads.out_stride + channel);
  }
}

// All that one thread does. The loops run once but for the largest sizes.
template <typename T, typename Table, int kWidth, typename Machine>
ROTARY_EXPORT_HOST_DEVICE void RotateThread(const Launch& launch, const ThreadIndex& index,
                                            const Machine& machine) {
  const uint32_t row = index.block_x * launch.threads_y + index.thread_y;
  if (row >= launch.row_count) return;
  const int64_t position = FindPosition(launch, row);
  ROTARY_EXPORT_NO_UNROLL
  for (int64_t repeat = index.block_z; repeat < launch.repeats; repeat += launch.blocks_z) {
    const Place place = FindPlace(launch, row, repeat);
    const HeadGroup<T> heads = FindHeads<T>(launch, index.block_y, place);
    const int64_t table_row = position + place.batch * launch.params.table_batch_step;
    ROTARY_EXPORT_NO_UNROLL
    for (uint32_t chunk = index.thread_x; chunk < launch.chunks; chunk += launch.threads_x) {
      if (chunk < launch.rotate_chunks) {
        RotateChunk<T, Table, kWidth>(launch, heads, table_row, chunk, machine);
      } else {
        const int64_t copied = int64_t{chunk - launch.rotate_chunks} * kWidth;
        CopyTail<T, kWidth>(heads, launch.params.rotary_dim + copied, machine);
      }
    }
  }
}

}  // namespace cuda
}  // namespace rotary_export

#endif  // ROTARY_EXPORT_CUDA_THREAD_INDEX_H_
