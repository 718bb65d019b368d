// Compiled once per instruction set, each time with its own compiler flags and with
// ROTARY_EXPORT_ISA_NAMESPACE set to its name. Everything but RotateRows is in an anonymous
// namespace, and no header with inline functions of external linkage is included. Otherwise the
// linker could keep the AVX-512 copy of a function and call it from the baseline.
//
// Exactness: each product is rounded, then their sum (-ffp-contract=off, which GCC honours for
// vector types). In float32 this computes the bits of eager PyTorch's
//   x * cos + rotate_half(x) * sin
// and, with xPos,
//   (x * cos) * scale + (rotate_half(x) * sin) * scale
// since a + (-b) equals a - b. The half types are computed in float32 and rounded once.
//
// Memory bounds the speed, so the order of accesses matters. From the outside in:
//   RotateRowsOf    blocks of rows of one batch entry, a page or two of each head. The tables of a
//                   block are looked up, converted and reordered once; they stay in the L1 cache
//                   for all heads
//   RotateHeads     one block of every head; each head's memory is contiguous
//   RotateRun       one such run, with plain or streaming stores. Streaming stores need aligned
//                   addresses, so an unaligned output goes through a write-combining buffer
//   RotateVector    one head vector: head_dim channels at one position
#include "kernel/rotary_kernel.h"

#include <cstring>
#include <type_traits>

#include "kernel/simd.h"
#include "kernel/table_block.h"

namespace rotary_export {
namespace ROTARY_EXPORT_ISA_NAMESPACE {
namespace {

constexpr int64_t kPageBytes = 4 * 1024;
constexpr int64_t kPrefetchBytes = 4 * 1024;  // How far ahead; the processor stops at each page.
constexpr int64_t kBurstBytes = 512;          // Longer bursts of streaming stores delay the loads.
constexpr int64_t kBufferBytes = 2 * 1024;    // The longest head vector that is buffered.

// ---- The two layouts
//
// Each rotates the channels of table entries [i, i + kLanes). `x` and `y` point to the first pair
// of the tables. A channel is read before it is written, so y may be x.

// Pairs are (i, i + half). The tables have one entry per pair.
struct Halves {
  static constexpr int kEntriesPerPair = 1;

  template <int kLanes, bool kScaled, Stores kStores, typename T, typename C, typename Check>
  static ROTARY_EXPORT_INLINE void Rotate(const T* x, T* y, const TableRow<C>& table, int64_t i,
                                          int64_t half, Check* check) {
    const auto cos = LoadVector<kLanes>(table.cos + i);
    const auto sin = LoadVector<kLanes>(table.sin + i);
    const auto x1 = LoadVector<kLanes>(x + i);
    const auto x2 = LoadVector<kLanes>(x + half + i);
    auto x1_cos = x1 * cos;
    auto x2_sin = x2 * sin;
    auto x2_cos = x2 * cos;
    auto x1_sin = x1 * sin;
    if constexpr (kScaled) {
      const auto scale = LoadVector<kLanes>(table.scale + i);
      x1_cos = x1_cos * scale;
      x2_sin = x2_sin * scale;
      x2_cos = x2_cos * scale;
      x1_sin = x1_sin * scale;
    }
    StoreVector<kLanes, kStores>(x1_cos - x2_sin, y + i, check);
    StoreVector<kLanes, kStores>(x2_cos + x1_sin, y + half + i, check);
  }
};

// Pairs are (2i, 2i + 1). The tables have one entry per channel: (cos, cos), (-sin, sin).
struct Pairs {
  static constexpr int kEntriesPerPair = 2;

  template <int kLanes, bool kScaled, Stores kStores, typename T, typename C, typename Check>
  static ROTARY_EXPORT_INLINE void Rotate(const T* x, T* y, const TableRow<C>& table, int64_t i,
                                          int64_t, Check* check) {
    const auto x12 = LoadVector<kLanes>(x + i);
    auto by_cos = x12 * LoadVector<kLanes>(table.cos + i);
    auto by_sin = SwapPairs<kLanes>(x12) * LoadVector<kLanes>(table.sin + i);
    if constexpr (kScaled) {
      const auto scale = LoadVector<kLanes>(table.scale + i);
      by_cos = by_cos * scale;
      by_sin = by_sin * scale;
    }
    StoreVector<kLanes, kStores>(by_cos + by_sin, y + i, check);
  }
};

// Rotates by table entries [i, count), fewer than 2 * kLanes, with ever narrower vectors.
template <typename Layout, bool kScaled, int kLanes, typename T, typename C>
inline void RotateRest(const T* x, T* y, const TableRow<C>& table, int64_t i, int64_t count,
                       int64_t half) {
  if (i + kLanes <= count) {
    CheckEach check;
    Layout::template Rotate<kLanes, kScaled, Stores::kPlain>(x, y, table, i, half, &check);
    i += kLanes;
  }
  if constexpr (kLanes > Layout::kEntriesPerPair) {
    if (i < count) RotateRest<Layout, kScaled, kLanes / 2>(x, y, table, i, count, half);
  }
}

// ---- From a block of rows to a head vector

// Elements from one head vector to the next, in one direction.
struct Axis {
  int64_t count;
  int64_t in_step;
  int64_t out_step;
  int64_t table_step;
};

// The work on each head vector. A local copy of the parameters: for all that the compiler knows, a
// store to the output may change RotaryParams.
struct VectorWork {
  int64_t first;    // The first pair's first channel.
  int64_t entries;  // Table entries per head vector.
  int64_t half;     // The distance between a pair's two channels (Halves).
  int64_t tail;     // The first channel to copy.
  int64_t head_dim;
  bool prefetch;
};

// The kinds of runs of head vectors.
enum class Run {
  kAny,        // May have a rest, a tail and a prefetch.
  kWhole,      // Whole vectors of entries, nothing else.
  kStreaming,  // Whole vectors of entries, with streaming stores; a tail of whole cache lines.
};

template <typename Layout, bool kScaled, Run kRun, typename T, typename C>
ROTARY_EXPORT_INLINE void RotateVector(const VectorWork& work, const T* x, T* y,
                                       const TableRow<C>& table) {
  constexpr int kLanes = kWidest<T>;
  constexpr Stores kStores = kRun == Run::kStreaming ? Stores::kStreaming : Stores::kPlain;
  if (kRun != Run::kWhole && work.prefetch) {
    const auto ahead = reinterpret_cast<uintptr_t>(x) + kPrefetchBytes;
    for (int64_t i = 0; i < work.head_dim * int64_t{sizeof(T)}; i += kLineBytes) {
      // To read, into the second-level cache: the first level's buffers are busy with the stores.
      __builtin_prefetch(reinterpret_cast<const void*>(ahead + static_cast<uintptr_t>(i)), 0, 2);
    }
  }
  const T* from = x + work.first;
  T* to = y + work.first;
  int64_t i = 0;
  const auto rotate = [&](auto check) __attribute__((always_inline)) {
    i = 0;
#pragma GCC unroll 2  // For one decoded token, the loop's own instructions count.
    for (; i + kLanes <= work.entries; i += kLanes) {
      Layout::template Rotate<kLanes, kScaled, kStores>(from, to, table, i, work.half, &check);
    }
    return check;
  };
  if constexpr (kRun == Run::kStreaming && kCanCheckLater<T>) {  // x is unchanged: can repeat.
    const CheckLater check = rotate(CheckLater());
    if (__builtin_expect(~check.are_normal != 0, false)) rotate(CheckEach());
  } else {
    rotate(CheckEach());
  }
  if constexpr (kRun == Run::kAny && kLanes > Layout::kEntriesPerPair) {
    RotateRest<Layout, kScaled, kLanes / 2>(from, to, table, i, work.entries, work.half);
  }
  if (kRun != Run::kWhole && work.tail < work.head_dim && x != y) {
    const char* tail = reinterpret_cast<const char*>(x + work.tail);
    char* tail_out = reinterpret_cast<char*>(y + work.tail);
    const int64_t bytes = (work.head_dim - work.tail) * int64_t{sizeof(T)};
    if constexpr (kRun == Run::kStreaming) {
      StreamLines(tail, tail_out, bytes);
    } else {
      CopyBytes(tail, tail_out, bytes);
    }
  }
}

// Small structs, by value in the cached case, to stay in registers. Measured: bfloat16 gains 15%,
// float32 5%. With streaming stores, where only the order of loads and stores counts, it is as
// often slower.
template <Run kRun, typename V>
using Argument = std::conditional_t<kRun == Run::kWhole, const V, const V&>;

// Rotates the head vectors along `axis`.
template <typename Layout, bool kScaled, Run kRun, typename T, typename C>
inline void RotateVectors(Argument<kRun, VectorWork> work, const T* x, T* y, TableRow<C> table,
                          Argument<kRun, Axis> axis) {
  for (int64_t i = 0; i < axis.count; ++i) {
    RotateVector<Layout, kScaled, kRun>(work, x, y, table);
    x += axis.in_step;
    y += axis.out_step;
    table = Advance(table, axis.table_step);
  }
}

// RotateVectors with streaming stores, for an output without gaps at any address. Head vectors are
// rotated into a write-combining buffer, and whole cache lines are copied from it to the output.
template <typename Layout, bool kScaled, typename T, typename C>
inline void StreamVectors(const VectorWork& work, const T* x, T* y, TableRow<C> table,
                          const Axis& axis) {
  alignas(kLineBytes) char buffer[kBufferBytes + 2 * kLineBytes];
  const int64_t vector_bytes = work.head_dim * int64_t{sizeof(T)};
  char* out = reinterpret_cast<char*>(y);
  int64_t buffered = 0;  // Bytes in the buffer.
  Axis part = axis;
  part.count = vector_bytes < kBurstBytes ? kBurstBytes / vector_bytes : 1;
  for (int64_t done = 0; done < axis.count; done += part.count) {
    if (part.count > axis.count - done) part.count = axis.count - done;
    RotateVectors<Layout, kScaled, Run::kAny>(work, x, reinterpret_cast<T*>(buffer + buffered),
                                              table, part);
    x += part.count * axis.in_step;
    table = Advance(table, part.count * axis.table_step);
    buffered += part.count * vector_bytes;
    const int64_t written = StreamLines(buffer, out, buffered);
    out += written;
    buffered -= written;
    std::memmove(buffer, buffer + written, kLineBytes);
  }
  CopyBytes(buffer, out, buffered);
}

template <typename T>
bool IsWholeLines(int64_t elements) {
  return elements * int64_t{sizeof(T)} % kLineBytes == 0;
}

template <typename Layout, bool kScaled, typename T, typename C>
void RotateRun(const RotaryParams& params, const Block& block, const T* x, T* y,
               const TableRow<C>& table, const Axis& axis) {
  const int64_t half = params.rotary_dim / 2;
  const int64_t entries = block.pairs * Layout::kEntriesPerPair;
  const int64_t tail = block.first_pair == 0 ? params.rotary_dim : params.head_dim;
  const int64_t first = block.first_pair * Layout::kEntriesPerPair;
  const VectorWork work = {first, entries, half, tail, params.head_dim, params.use_streaming};
  const bool whole = entries % kWidest<T> == 0;
  const bool stream = kCanStream && params.use_streaming && x != y && block.pairs == half &&
                      axis.out_step == params.head_dim;
  // An aligned output needs no buffer. It still pays for Halves without a conversion, where it puts
  // the stores of a vector's two halves in order.
  constexpr bool kDirect = Layout::kEntriesPerPair == 2 || sizeof(T) < sizeof(C);
  if (kDirect && stream && whole && IsWholeLines<T>(params.head_dim) &&
      IsWholeLines<T>(params.rotary_dim) && reinterpret_cast<uintptr_t>(y) % kLineBytes == 0) {
    RotateVectors<Layout, kScaled, Run::kStreaming>(work, x, y, table, axis);
  } else if (stream && params.head_dim <= kBufferBytes / int64_t{sizeof(T)}) {
    StreamVectors<Layout, kScaled>(work, x, y, table, axis);
  } else if (whole && tail == params.head_dim && !params.use_streaming) {
    RotateVectors<Layout, kScaled, Run::kWhole>(work, x, y, table, axis);
  } else {
    RotateVectors<Layout, kScaled, Run::kAny>(work, x, y, table, axis);
  }
}

template <typename Layout, typename T, typename C>
void RotateHeads(const RotaryParams& params, const Block& block, const TableBlock<C>& tables,
                 const Heads& heads) {
  if (heads.count == 0) return;  // Its pointers may be null.
  const HeadStrides& from = heads.in_strides;
  const HeadStrides& to = heads.out_strides;
  const Axis along_rows = {block.rows, from.row, to.row, tables.width};
  const Axis along_heads = {heads.count, from.head, to.head, 0};
  const bool rows_inside = block.rows > 1 && to.row < to.head;
  const Axis& inner = rows_inside ? along_rows : along_heads;
  const Axis& outer = rows_inside ? along_heads : along_rows;
  const T* x = static_cast<const T*>(heads.in) + block.batch * from.batch + block.row * from.row;
  T* y = static_cast<T*>(heads.out) + block.batch * to.batch + block.row * to.row;
  const auto rotate =
      tables.scaled ? RotateRun<Layout, true, T, C> : RotateRun<Layout, false, T, C>;
  for (int64_t i = 0; i < outer.count; ++i) {
    const TableRow<C> table = Advance(tables.first, i * outer.table_step);
    rotate(params, block, x + i * outer.in_step, y + i * outer.out_step, table, inner);
  }
}

// ---- Rows

// Rotates one block of every query and key head; they share the tables.
template <typename Layout, typename T, typename Table, typename C>
void RotateBlock(const RotaryParams& params, const Block& block, TableBlock<C>* tables) {
  FillTables<Layout, T, Table>(params, block, tables);
  RotateHeads<Layout, T>(params, block, *tables, params.query);
  if (params.key.count == 0) return;
  if (tables->scaled) {
    // xPos scales keys by the reciprocal, rounded once, like eager's `scale ** -1`.
    for (int64_t i = 0; i < block.rows * tables->width; ++i) {
      tables->scale[i] = 1 / tables->scale[i];
    }
  }
  RotateHeads<Layout, T>(params, block, *tables, params.key);
}

// The most rows of a block: two pages of each head, since the processor's prefetcher restarts at
// each run, but only one page if a table of two does not stay in the L1 cache beside the loop's
// data. (The entries of an interleaved half type are twice as long as its channels: one page fits
// kTableBytes.)
template <typename Layout, typename T>
int64_t ChooseMaxRows(const RotaryParams& params) {
  constexpr auto kPairBytes = int64_t{sizeof(Wide<T>)} * Layout::kEntriesPerPair;
  const int64_t page = kPageBytes / (params.head_dim * int64_t{sizeof(T)});
  const int64_t table_page = kPageBytes / (params.rotary_dim / 2 * kPairBytes);
  const int64_t rows = table_page < page ? page : table_page < 2 * page ? table_page : 2 * page;
  return rows > 1 ? rows : 1;
}

template <typename Layout, typename T, typename Table>
void RotateRowsOf(const RotaryParams& params, int64_t begin, int64_t end) {
  TableBlock<Wide<T>> tables;
  const int64_t half = params.rotary_dim / 2;
  const int64_t max_pairs = tables.kEntries / Layout::kEntriesPerPair;
  const int64_t max_rows = ChooseMaxRows<Layout, T>(params);
  while (begin < end) {
    Block block = {begin / params.seq_len, begin % params.seq_len, end - begin, 0, 0};
    if (block.rows > params.seq_len - block.row) block.rows = params.seq_len - block.row;
    if (block.rows > max_rows) block.rows = max_rows;
    for (; block.first_pair < half; block.first_pair += block.pairs) {
      const int64_t left = half - block.first_pair;
      block.pairs = left < max_pairs ? left : max_pairs;
      RotateBlock<Layout, T, Table>(params, block, &tables);
    }
    begin += block.rows;
  }
  if (params.use_streaming) FinishStreaming();
}

template <typename T, typename Table>
void RotateRowsOf(const RotaryParams& params, int64_t begin, int64_t end) {
  const auto rotate =
      params.interleaved ? RotateRowsOf<Pairs, T, Table> : RotateRowsOf<Halves, T, Table>;
  rotate(params, begin, end);
}

}  // namespace

void RotateRows(const RotaryParams& params, int64_t begin, int64_t end) {
#define ROTARY_EXPORT_ROTATE(T, Table)                     \
  if (params.x_type == ElementTypeOf<T>::kValue &&         \
      params.table_type == ElementTypeOf<Table>::kValue) { \
    return RotateRowsOf<T, Table>(params, begin, end);     \
  }
  ROTARY_EXPORT_TYPE_PAIRS(ROTARY_EXPORT_ROTATE)
#undef ROTARY_EXPORT_ROTATE
}

}  // namespace ROTARY_EXPORT_ISA_NAMESPACE
}  // namespace rotary_export
