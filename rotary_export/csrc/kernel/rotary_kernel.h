// The rotation itself: plain pointers and sizes, nothing of ONNX Runtime.
//
// input_checks.cc fills a RotaryParams once per call. A row is one position of one batch entry; the
// caller splits the batch_size * seq_len rows over threads.
//
// This header is compiled once per instruction set (see rotary_kernel.cc). It must not define
// anything that the linker could merge between them: no inline function, no member function.
#ifndef ROTARY_EXPORT_KERNEL_ROTARY_KERNEL_H_
#define ROTARY_EXPORT_KERNEL_ROTARY_KERNEL_H_

#include <cstdint>

#include "kernel/element_types.h"

namespace rotary_export {

// Elements from one batch entry, head or row to the next. A head's channels are contiguous.
struct HeadStrides {
  int64_t batch;
  int64_t head;
  int64_t row;
};

// The heads of X and Y, or of key and key_out. `out` may be `in` (with the same strides).
struct Heads {
  const void* in;
  void* out;
  int64_t count;
  HeadStrides in_strides;
  HeadStrides out_strides;
};

struct RotaryParams {
  RotaryExportType x_type;      // X, key, Y, key_out.
  RotaryExportType table_type;  // The two are one of ROTARY_EXPORT_TYPE_PAIRS.
  bool interleaved;             // Pairs are (2i, 2i + 1), else (i, i + rotary_dim / 2).
  int64_t batch_size;
  int64_t seq_len;
  int64_t head_dim;
  int64_t rotary_dim;
  Heads query;
  Heads key;  // count 0 without a key.

  // Tables: contiguous rows of rotary_dim / 2.
  const void* cos_cache;
  const void* sin_cache;
  const void* scale_cache;  // Null without xPos.
  int64_t table_rows;       // position_ids must be less than this.

  // Row s of batch b uses table row
  //   (position_ids ? position_ids[b * id_batch_stride + s * id_row_stride] : 0)
  //   + b * table_batch_step + s * table_row_step
  // This covers ids per batch entry, shared ids, an offset, and tables with a row per position.
  const int64_t* position_ids;
  int64_t id_batch_stride;
  int64_t id_row_stride;
  int64_t table_batch_step;
  int64_t table_row_step;

  bool use_streaming;  // Outputs larger than the cache: ChooseRotation (isa_dispatch.h) decides.
};

// Rotates rows [begin, end) of the batch_size * seq_len rows. Positions have been checked before.
using RotateRowsFunction = void (*)(const RotaryParams& params, int64_t begin, int64_t end);

// One for each instruction set that CMakeLists.txt compiles rotary_kernel.cc for.
namespace baseline {
void RotateRows(const RotaryParams& params, int64_t begin, int64_t end);
}
namespace avx2 {
void RotateRows(const RotaryParams& params, int64_t begin, int64_t end);
}
namespace avx512 {
void RotateRows(const RotaryParams& params, int64_t begin, int64_t end);
}
namespace avx512bf16 {
void RotateRows(const RotaryParams& params, int64_t begin, int64_t end);
}
namespace neon {
void RotateRows(const RotaryParams& params, int64_t begin, int64_t end);
}

}  // namespace rotary_export

#endif  // ROTARY_EXPORT_KERNEL_ROTARY_KERNEL_H_
