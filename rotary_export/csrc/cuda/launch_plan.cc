#include "cuda/launch_plan.h"

namespace rotary_export {
namespace {

constexpr int64_t kMaxRows = int64_t{1} << 30;  // Of a launch: row numbers fit 32 bits.
constexpr int64_t kMaxBlocksYZ = 65535;         // CUDA's limit.

// The threads that keep a large GPU busy. With more, each thread rotates several heads, which saves
// table reads. Chosen by reasoning: never measured on a GPU.
constexpr int64_t kBusyThreads = int64_t{1} << 18;
constexpr int64_t kMaxHeadsPerThread = 4;

int64_t DivideUp(int64_t a, int64_t b) { return (a + b - 1) / b; }

int64_t Clamp(int64_t value, int64_t low, int64_t high) {
  return value < low ? low : value > high ? high : value;
}

bool HasVectors(const void* data) { return reinterpret_cast<uintptr_t>(data) % kVectorBytes == 0; }

bool HasVectors(const HeadStrides& strides, int64_t width) {
  return strides.batch % width == 0 && strides.head % width == 0 && strides.row % width == 0;
}

bool HasVectors(const Heads& heads, int64_t width) {
  return heads.count == 0 ||
         (HasVectors(heads.in) && HasVectors(heads.out) && HasVectors(heads.in_strides, width) &&
          HasVectors(heads.out_strides, width));
}

// Whether every access of a thread starts at a multiple of 16 bytes. (Vectors of a table of another
// type have as many entries, so they are aligned to their own size.)
bool CanUseVectors(const RotaryParams& params, int64_t width) {
  return params.rotary_dim / 2 % width == 0 && params.head_dim % width == 0 &&
         HasVectors(params.query, width) && HasVectors(params.key, width) &&
         HasVectors(params.cos_cache) && HasVectors(params.sin_cache) &&
         HasVectors(params.scale_cache);
}

// Fills the runs of rows [begin, end), or of as many rows as fit. Returns the row after the last.
int64_t FillRuns(const RotaryParams& params, int64_t begin, int64_t end, Launch* launch) {
  const int64_t* ids = params.position_ids;
  if (params.id_row_stride == 0) {  // An offset, or tables with one row for each row of X.
    launch->run_count = 1;
    launch->run_rows[0] = 0;
    launch->run_positions[0] = (ids != nullptr ? ids[0] : 0) + begin;
    return end;
  }
  int64_t run_offset = 0;  // position - row in the last run.
  for (int64_t row = begin; row < end; ++row) {
    if (launch->run_count > 0 && ids[row] - row == run_offset) continue;
    if (launch->run_count == kMaxRuns) return row;
    launch->run_rows[launch->run_count] = static_cast<uint32_t>(row - begin);
    launch->run_positions[launch->run_count] = ids[row];
    ++launch->run_count;
    run_offset = ids[row] - row;
  }
  return end;
}

void SplitWork(const RotaryParams& params, Launch* launch) {
  const int64_t vector_width = kVectorBytes / SizeOf(params.x_type);
  launch->is_vector = CanUseVectors(params, vector_width);
  const int64_t width = launch->is_vector ? vector_width : 1;
  const bool has_tail = params.query.in != params.query.out || params.key.in != params.key.out;
  const int64_t rotate_chunks = params.rotary_dim / 2 / width;
  const int64_t tail_chunks = has_tail ? (params.head_dim - params.rotary_dim) / width : 0;
  const int64_t chunks = rotate_chunks + tail_chunks;
  launch->rotate_chunks = static_cast<uint32_t>(rotate_chunks);
  launch->chunks = static_cast<uint32_t>(chunks);

  const int64_t heads = params.query.count + params.key.count;
  const int64_t threads = chunks * launch->row_count * launch->repeats * heads;
  const int64_t affordable = Clamp(threads / kBusyThreads, 1, kMaxHeadsPerThread);
  const int64_t needed = DivideUp(heads, kMaxBlocksYZ - 1);  // Query and key round up separately.
  launch->heads_per_thread = affordable > needed ? affordable : needed;
  launch->query_groups = DivideUp(params.query.count, launch->heads_per_thread);
  const int64_t key_groups = DivideUp(params.key.count, launch->heads_per_thread);

  const int64_t threads_x = Clamp(chunks, 1, kThreadsPerBlock);
  const int64_t threads_y = Clamp(launch->row_count, 1, kThreadsPerBlock / threads_x);
  launch->threads_x = static_cast<uint32_t>(threads_x);
  launch->threads_y = static_cast<uint32_t>(threads_y);
  launch->blocks_x = static_cast<uint32_t>(DivideUp(launch->row_count, threads_y));
  launch->blocks_y = static_cast<uint32_t>(launch->query_groups + key_groups);
  launch->blocks_z = static_cast<uint32_t>(Clamp(launch->repeats, 1, kMaxBlocksYZ));
}

}  // namespace

int64_t CountRows(const RotaryParams& params) {
  return params.id_batch_stride != 0 ? params.batch_size * params.seq_len : params.seq_len;
}

int64_t PlanLaunch(const RotaryParams& params, int64_t begin, Launch* launch) {
  const int64_t rows = CountRows(params);
  const int64_t limit = rows - begin < kMaxRows ? rows : begin + kMaxRows;
  launch->params = params;
  launch->params.position_ids = nullptr;
  launch->has_ids_per_batch = params.id_batch_stride != 0;
  launch->first_batch = launch->has_ids_per_batch ? begin / params.seq_len : 0;
  launch->first_row = launch->has_ids_per_batch ? begin % params.seq_len : begin;
  launch->repeats = launch->has_ids_per_batch ? 1 : params.batch_size;
  launch->run_count = 0;
  const int64_t end = FillRuns(params, begin, limit, launch);
  launch->row_count = static_cast<uint32_t>(end - begin);
  SplitWork(params, launch);
  return end;
}

}  // namespace rotary_export
