// Plans the CUDA launches of one call of the op: plain numbers, computed on the host and passed to
// the kernel as its only argument. Nothing here needs CUDA.
#ifndef ROTARY_EXPORT_CUDA_LAUNCH_PLAN_H_
#define ROTARY_EXPORT_CUDA_LAUNCH_PLAN_H_

#include <cstdint>

#include "kernel/rotary_kernel.h"

namespace rotary_export {

constexpr int kThreadsPerBlock = 256;
constexpr int kVectorBytes = 16;

// Positions are passed as runs, within the 4096 bytes that every GPU allows for a kernel's
// arguments: no copy to the device, no buffer, no wait. A run is rows `row`, row + 1, ... at
// positions `position`, position + 1, ... A prompt or a decoded token is one run per batch entry; a
// packed sequence is one run per document. Ids with more runs than this need several launches.
constexpr uint32_t kMaxRuns = 256;

// A block rotates `threads_y` rows of a group of heads. threadIdx.x is a chunk of a head's
// channels, threadIdx.y the row. blockIdx.x counts blocks of rows, y groups of heads, z batch
// entries that share their ids.
struct Launch {
  RotaryParams params;  // position_ids is null: it points to the host's memory.
  bool is_vector;       // 16-byte accesses; else one element at a time.

  // The rows of this launch. With ids per batch entry: row_count rows from row first_row of entry
  // first_batch on, across the ends of entries. Otherwise row_count rows from first_row on, in each
  // of `repeats` batch entries.
  bool has_ids_per_batch;
  int64_t first_batch;
  int64_t first_row;
  int64_t repeats;
  uint32_t row_count;

  uint32_t chunks;         // Of a head: first the rotated ones, then the copied ones.
  uint32_t rotate_chunks;  // A rotated chunk is two vectors, one of each channel of its pairs.
  int64_t heads_per_thread;
  int64_t query_groups;  // Groups of query heads; the groups of key heads follow.

  uint32_t threads_x, threads_y;
  uint32_t blocks_x, blocks_y, blocks_z;

  uint32_t run_count;  // At least 1.
  uint32_t run_rows[kMaxRuns];
  int64_t run_positions[kMaxRuns];
};
static_assert(sizeof(Launch) <= 4096, "the arguments of a kernel");

// Plans the launch that starts at row `begin`. If each batch entry has its own ids, rows are
// counted over all entries, otherwise over one. Returns the first row of the next launch, or
// CountRows(params) after the last. Requires batch_size > 0, seq_len > 0 and checked positions.
int64_t PlanLaunch(const RotaryParams& params, int64_t begin, Launch* launch);

int64_t CountRows(const RotaryParams& params);

}  // namespace rotary_export

#endif  // ROTARY_EXPORT_CUDA_LAUNCH_PLAN_H_
