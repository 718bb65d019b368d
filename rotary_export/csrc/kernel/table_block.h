// The tables of a block of rows, looked up, converted and reordered once for all heads. This header
// is compiled once per instruction set, hence the anonymous namespace (see rotary_kernel.cc).
#ifndef ROTARY_EXPORT_KERNEL_TABLE_BLOCK_H_
#define ROTARY_EXPORT_KERNEL_TABLE_BLOCK_H_

#include <cstdint>
#include <type_traits>

#include "kernel/rotary_kernel.h"
#include "kernel/simd.h"

namespace rotary_export {
namespace {

constexpr int64_t kTableBytes = 8 * 1024;  // Each of three tables at most; they stay in L1.

template <typename C>
struct TableRow {
  const C* cos;
  const C* sin;
  const C* scale;  // Not read without xPos.
};

template <typename C>
ROTARY_EXPORT_INLINE TableRow<C> Advance(const TableRow<C>& table, int64_t entries) {
  return {table.cos + entries, table.sin + entries, table.scale + entries};
}

// The tables of a block of rows: `width` entries per row, in the order of the layout and, for
// bfloat16, of EvenOdd. `first` points to the arrays below, or, for cos and sin that are already in
// that order, to the caller's tables.
template <typename C>
struct TableBlock {
  static constexpr int64_t kEntries = kTableBytes / sizeof(C);
  int64_t width;
  bool scaled;
  TableRow<C> first;
  alignas(64) C cos[kEntries];
  alignas(64) C sin[kEntries];
  alignas(64) C scale[kEntries];
};

// Rows [row, row + rows) of one batch entry, and pairs [first_pair, first_pair + pairs) of them:
// all pairs, unless one row alone does not fit a TableBlock.
struct Block {
  int64_t batch;
  int64_t row;
  int64_t rows;
  int64_t first_pair;
  int64_t pairs;
};

int64_t FindTableRow(const RotaryParams& params, int64_t batch, int64_t row) {
  const int64_t first = batch * params.table_batch_step + row * params.table_row_step;
  if (params.position_ids == nullptr) return first;
  return first + params.position_ids[batch * params.id_batch_stride + row * params.id_row_stride];
}

// Writes entries [i, count) of one table row in the order of a TableBlock. If a pair has two
// entries, the first of them is multiplied by `sign`.
template <typename Layout, int kLanes, typename Table, typename C>
inline void LayOutEntries(const Table* row, int64_t i, int64_t count, C sign, C* out) {
  using V = Vector<C, kLanes>;
  for (; i + kLanes <= count; i += kLanes) {
    if constexpr (Layout::kEntriesPerPair == 1) {
      StoreVector<kLanes>(__builtin_convertvector(LoadVector<kLanes>(row + i), V), out + i);
    } else {
      const auto doubled = Double<kLanes>(LoadVector<kLanes / 2>(row + i / 2));
      V signs;
      for (int lane = 0; lane < kLanes; ++lane) signs[lane] = lane % 2 == 0 ? sign : 1;
      StoreVector<kLanes>(__builtin_convertvector(doubled, V) * signs, out + i);
    }
  }
  if constexpr (kLanes > Layout::kEntriesPerPair) {
    if (i < count) LayOutEntries<Layout, kLanes / 2>(row, i, count, sign, out);
  }
}

// Whether the rows of a block are whole and consecutive in the caller's tables.
bool AreConsecutive(const RotaryParams& params, const Block& block) {
  const int64_t first = FindTableRow(params, block.batch, block.row);
  for (int64_t i = 1; i < block.rows; ++i) {
    if (FindTableRow(params, block.batch, block.row + i) != first + i) return false;
  }
  return block.pairs == params.rotary_dim / 2;
}

template <typename Layout, typename T, typename Table, typename C>
void FillTables(const RotaryParams& params, const Block& block, TableBlock<C>* tables) {
  tables->width = block.pairs * Layout::kEntriesPerPair;
  tables->scaled = params.scale_cache != nullptr;
  tables->first = {tables->cos, tables->sin, tables->scale};
  const auto lay_out = [width = tables->width](const Table* row, C sign, C* out) {
    LayOutEntries<Layout, kVectorBytes / sizeof(C)>(row, 0, width, sign, out);
    if constexpr (kIsEvenOdd<C, kWidest<T>>) SplitEvenOdd<kWidest<T>>(out, width);
  };
  const auto* cos = static_cast<const Table*>(params.cos_cache);
  const auto* sin = static_cast<const Table*>(params.sin_cache);
  const auto* scale = static_cast<const Table*>(params.scale_cache);
  bool use_caller_tables = false;
  if constexpr (std::is_same_v<Table, C> && Layout::kEntriesPerPair == 1 &&
                !kIsEvenOdd<C, kWidest<T>>) {
    const int64_t first = FindTableRow(params, block.batch, block.row) * tables->width;
    use_caller_tables = AreConsecutive(params, block);
    if (use_caller_tables) tables->first = {cos + first, sin + first, tables->scale};
  }
  for (int64_t i = 0; i < block.rows; ++i) {
    const int64_t row = FindTableRow(params, block.batch, block.row + i);
    const int64_t first = row * (params.rotary_dim / 2) + block.first_pair;
    const int64_t at = i * tables->width;
    if (!use_caller_tables) {
      lay_out(cos + first, 1, tables->cos + at);
      lay_out(sin + first, -1, tables->sin + at);
    }
    if (tables->scaled) lay_out(scale + first, 1, tables->scale + at);
  }
}

}  // namespace
}  // namespace rotary_export

#endif  // ROTARY_EXPORT_KERNEL_TABLE_BLOCK_H_
