// How one call of the op becomes CUDA launches: plain numbers that a host compiler computes and a
// kernel takes as its one argument. Nothing here needs CUDA.
#ifndef ROTARY_EXPORT_CUDA_LAUNCH_PLAN_H_
#define ROTARY_EXPORT_CUDA_LAUNCH_PLAN_H_

#include <cstdint>

#include "kernel/rotary_kernel.h"

namespace rotary_export {

// The pairs of element types that there are kernels for: X's, and the tables'.
#define ROTARY_EXPORT_CUDA_TYPES(TYPES) \
  TYPES(Float32, Float32)               \
  TYPES(Float16, Float16)               \
  TYPES(Float16, Float32)               \
  TYPES(BFloat16, BFloat16)             \
  TYPES(BFloat16, Float32)              \
  TYPES(Float64, Float64)               \
  TYPES(Float64, Float32)

constexpr int kThreadsPerBlock = 256;
constexpr int kVectorBytes = 16;

// Positions travel as runs, within the 4096 bytes that every GPU allows a kernel's arguments: no
// copy to the device, no buffer, nothing to wait for. A run is rows `row`, row + 1, ... at
// positions `position`, position + 1, ...; a prompt or a decoded token is one run per batch entry,
// a packed sequence one per document. Ids of more runs than this take several launches.
constexpr uint32_t kMaxRuns = 256;

// A block takes `threads_y` rows of a group of heads. Its threads differ in x by a chunk of a
// head's channels and in y by the row. blockIdx.x counts rows, y groups of heads, z batch entries
// that share their ids.
struct Launch {
  RotaryParams params;  // position_ids is null: it points to the host's memory.
  bool is_vector;       // 16-byte accesses; else one element at a time.

  // The rows of this launch. Ids per batch entry: rows of [first_batch, first_row] and on, over the
  // ends of batch entries. Else rows first_row and on of each of `repeats` batch entries.
  bool has_ids_per_batch;
  int64_t first_batch;
  int64_t first_row;
  int64_t repeats;
  uint32_t row_count;

  uint32_t chunks;         // Of a head: first those that are rotated, then those that are copied.
  uint32_t rotate_chunks;  // A vector of each half of the pairs.
  int64_t heads_per_thread;
  int64_t query_groups;  // Groups of heads; those of the key follow.

  uint32_t threads_x, threads_y;
  uint32_t blocks_x, blocks_y, blocks_z;

  uint32_t run_count;  // At least 1.
  uint32_t run_rows[kMaxRuns];
  int64_t run_positions[kMaxRuns];
};
static_assert(sizeof(Launch) <= 4096, "the arguments of a kernel");

// Plans the launch that starts at row `begin`, where rows count over all batch entries if each has
// ids of its own and over one of them if not. Returns the row that the next launch starts at;
// CountRows(params) says that there is none. Needs a batch_size and a seq_len that are not 0, and
// checked positions.
int64_t PlanLaunch(const RotaryParams& params, int64_t begin, Launch* launch);

int64_t CountRows(const RotaryParams& params);

}  // namespace rotary_export

#endif  // ROTARY_EXPORT_CUDA_LAUNCH_PLAN_H_
