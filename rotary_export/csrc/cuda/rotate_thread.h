// The work of one CUDA thread: which channels of which heads it owns, and their rotation. Host
// compilers accept this header too, so tests/helpers/cuda_emulator.cc can run every thread of every
// block on the CPU.
//
// A memory policy (`Memory`) reads and writes elements and converts the half types. That of
// rotary_kernel.cu uses 16-byte accesses; that of the emulator checks each access.
#ifndef ROTARY_EXPORT_CUDA_ROTATE_THREAD_H_
#define ROTARY_EXPORT_CUDA_ROTATE_THREAD_H_

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

struct ThreadIndex {
  uint32_t block_x, block_y, block_z;
  uint32_t thread_x, thread_y;
};

// ---- arithmetic: every operation is rounded, as in eager PyTorch; no FMA

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

// Rotates the pair (*a, *b), with the operations of rotary_kernel.cc in the same order.
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

// ---- indexing: which table row, which heads

// Finds the position of a row of the launch, from the last run that starts at or before it.
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

struct RowIndex {
  int64_t batch;
  int64_t row;  // In the batch entry.
};

ROTARY_EXPORT_HOST_DEVICE RowIndex FindRowIndex(const Launch& launch, uint32_t row,
                                                int64_t repeat) {
  if (!launch.has_ids_per_batch) return {repeat, launch.first_row + row};
  const auto from_first = static_cast<uint64_t>(launch.first_row + row);
  const auto seq_len = static_cast<uint64_t>(launch.params.seq_len);
  return {launch.first_batch + static_cast<int64_t>(from_first / seq_len),
          static_cast<int64_t>(from_first % seq_len)};
}

// Consecutive heads of X or of key, at one row.
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
ROTARY_EXPORT_HOST_DEVICE HeadGroup<T> FindHeads(const Launch& launch, int64_t group,
                                                 RowIndex index) {
  const bool is_key = group >= launch.query_groups;
  const Heads& heads = is_key ? launch.params.key : launch.params.query;
  const int64_t first = (is_key ? group - launch.query_groups : group) * launch.heads_per_thread;
  const int64_t left = heads.count - first;
  const HeadStrides& from = heads.in_strides;
  const HeadStrides& to = heads.out_strides;
  HeadGroup<T> found;
  found.in = static_cast<const T*>(heads.in) + index.batch * from.batch + first * from.head +
             index.row * from.row;
  found.out =
      static_cast<T*>(heads.out) + index.batch * to.batch + first * to.head + index.row * to.row;
  found.in_stride = from.head;
  found.out_stride = to.head;
  found.count = left < launch.heads_per_thread ? left : launch.heads_per_thread;
  found.is_key = is_key;
  return found;
}

// ---- rotation

template <typename Table, int kWidth, typename C, typename Memory>
ROTARY_EXPORT_HOST_DEVICE void LoadTable(const Memory& memory, const void* table, int64_t entry,
                                         C (&to)[kWidth]) {
  Table entries[kWidth];
  memory.ReadTable(static_cast<const Table*>(table) + entry, entries);
  ROTARY_EXPORT_UNROLL
  for (int i = 0; i < kWidth; ++i) to[i] = static_cast<C>(memory.Widen(entries[i]));
}

// Rotates pairs [chunk * kWidth, (chunk + 1) * kWidth) of each head. Their channels are two
// vectors: adjacent ones if interleaved, otherwise rotary_dim / 2 apart.
template <typename T, typename Table, int kWidth, typename Memory>
ROTARY_EXPORT_HOST_DEVICE void RotateChunk(const Launch& launch, const HeadGroup<T>& heads,
                                           int64_t table_row, int64_t chunk, const Memory& memory) {
  using C = decltype(memory.Widen(T()));
  const RotaryParams& params = launch.params;
  const int64_t half = params.rotary_dim / 2;
  const int64_t pair = chunk * kWidth;
  const int64_t entry = table_row * half + pair;
  const bool is_scaled = params.scale_cache != nullptr;
  C cos[kWidth], sin[kWidth], scale[kWidth] = {};
  LoadTable<Table>(memory, params.cos_cache, entry, cos);
  LoadTable<Table>(memory, params.sin_cache, entry, sin);
  if (is_scaled) {
    LoadTable<Table>(memory, params.scale_cache, entry, scale);
    if (heads.is_key) {
      ROTARY_EXPORT_UNROLL
      for (int i = 0; i < kWidth; ++i) scale[i] = Invert(scale[i]);
    }
  }
  const int64_t first = params.interleaved ? 2 * pair : pair;
  const int64_t distance = params.interleaved ? kWidth : half;
  // Y may be X, so the loads of one head cannot move above the stores of the previous one:
  // unrolling would cost registers and gain nothing.
  const T* in = heads.in + first;
  T* out = heads.out + first;
  ROTARY_EXPORT_NO_UNROLL
  for (int64_t head = 0; head < heads.count; ++head) {
    T low[kWidth], high[kWidth];
    memory.Read(in, low);
    memory.Read(in + distance, high);
    C x[2 * kWidth];
    ROTARY_EXPORT_UNROLL
    for (int i = 0; i < kWidth; ++i) {
      x[i] = memory.Widen(low[i]);
      x[kWidth + i] = memory.Widen(high[i]);
    }
    // One loop per layout, so that all indices are constants and x stays in registers.
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
      memory.Narrow(x[i], &low[i]);
      memory.Narrow(x[kWidth + i], &high[i]);
    }
    memory.Write(low, out);
    memory.Write(high, out + distance);
    in += heads.in_stride;
    out += heads.out_stride;
  }
}

// Copies channels past rotary_dim, keeping their bits.
template <typename T, int kWidth, typename Memory>
ROTARY_EXPORT_HOST_DEVICE void CopyTail(const HeadGroup<T>& heads, int64_t channel,
                                        const Memory& memory) {
  if (heads.in == heads.out) return;
  ROTARY_EXPORT_NO_UNROLL
  for (int64_t head = 0; head < heads.count; ++head) {
    T values[kWidth];
    memory.Read(heads.in + head * heads.in_stride + channel, values);
    memory.Write(values, heads.out + head * heads.out_stride + channel);
  }
}

// The work of one thread. The loops run once, except for the largest sizes.
template <typename T, typename Table, int kWidth, typename Memory>
ROTARY_EXPORT_HOST_DEVICE void RotateThread(const Launch& launch, const ThreadIndex& thread,
                                            const Memory& memory) {
  const uint32_t row = thread.block_x * launch.threads_y + thread.thread_y;
  if (row >= launch.row_count) return;
  const int64_t position = FindPosition(launch, row);
  ROTARY_EXPORT_NO_UNROLL
  for (int64_t repeat = thread.block_z; repeat < launch.repeats; repeat += launch.blocks_z) {
    const RowIndex index = FindRowIndex(launch, row, repeat);
    const HeadGroup<T> heads = FindHeads<T>(launch, thread.block_y, index);
    const int64_t table_row = position + index.batch * launch.params.table_batch_step;
    ROTARY_EXPORT_NO_UNROLL
    for (uint32_t chunk = thread.thread_x; chunk < launch.chunks; chunk += launch.threads_x) {
      if (chunk < launch.rotate_chunks) {
        RotateChunk<T, Table, kWidth>(launch, heads, table_row, chunk, memory);
      } else {
        const int64_t copied = int64_t{chunk - launch.rotate_chunks} * kWidth;
        CopyTail<T, kWidth>(heads, launch.params.rotary_dim + copied, memory);
      }
    }
  }
}

}  // namespace cuda
}  // namespace rotary_export

#endif  // ROTARY_EXPORT_CUDA_ROTATE_THREAD_H_
