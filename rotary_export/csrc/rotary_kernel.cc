// Compiled once per instruction set, each time with its own compiler flags and with
// ROTARY_EXPORT_ISA_NAMESPACE set to its name. Everything but RotateRows is in an anonymous
// namespace, and no header with inline functions of external linkage is included: else the linker
// could keep the AVX-512 copy of a function and hand it to the baseline.
//
// Exactness: each product is rounded, then one sum (-ffp-contract=off, and RoundProduct). In
// float32 that gives the bits of eager PyTorch's
//   x * cos + rotate_half(x) * sin,     with xPos  (x * cos) * scale + (rotate_half(x) * sin) *
//   scale
// since a + (-b) and a - b are the same. The half types are computed in float32 and rounded once.
#include "rotary_kernel.h"

#include <cstring>
#include <type_traits>

#include "rotary_convert.h"

#if defined(__clang__)
#define ROTARY_EXPORT_INDEPENDENT _Pragma("clang loop vectorize(assume_safety)")
#else
#define ROTARY_EXPORT_INDEPENDENT _Pragma("GCC ivdep")
#endif

namespace rotary_export {
namespace ROTARY_EXPORT_ISA_NAMESPACE {
namespace {

// Pairs per pass over a row's heads: what the table buffers on the stack hold. A rotary_dim of up
// to 512 takes one pass.
constexpr int64_t kMaxPairs = 256;

// A piece of one table row, in the type that is computed in.
template <typename C>
struct TablePiece {
  const C* cos;
  const C* sin;
  const C* scale;  // Null without xPos.
};

// Keeps a product apart from the sum that follows. GCC's vectoriser fuses neighbouring a * b - c
// and d * e + f into one vfmaddsub even with -ffp-contract=off; it can't see through this.
template <typename C>
inline C RoundProduct(C product) {
#if defined(__has_builtin)
#if __has_builtin(__builtin_assoc_barrier)
  return __builtin_assoc_barrier(product);
#endif
#endif
  return product;
}

int64_t FindTableRow(const RotaryParams& params, int64_t batch, int64_t row) {
  const int64_t first = batch * params.table_batch_step + row * params.table_row_step;
  if (params.position_ids == nullptr) return first;
  return first + params.position_ids[batch * params.id_batch_stride + row * params.id_row_stride];
}

// Returns `count` table entries as C: in place where they are that already, else in `buffer`.
template <typename C, typename Table>
const C* LoadTable(const void* table, int64_t first, int64_t count, C* buffer) {
  const Table* entries = static_cast<const Table*>(table) + first;
  if constexpr (std::is_same_v<C, Table>) {
    return entries;
  } else {
    for (int64_t i = 0; i < count; ++i) buffer[i] = Load(entries[i]);
    return buffer;
  }
}

// Rotates `count` pairs of one head, from pair `first` on. The layouts differ only in where a
// pair's two channels are. Each pair is read before it is written, so y may be x.
template <bool kInterleaved, bool kScaled, typename T, typename C>
void RotatePairs(const T* x, T* y, const TablePiece<C>& table, int64_t half, int64_t first,
                 int64_t count) {
  constexpr int64_t kStep = kInterleaved ? 2 : 1;
  const int64_t partner = kInterleaved ? 1 : half;
  const C* cos = table.cos;
  const C* sin = table.sin;
  const C* scale = table.scale;
  x += first * kStep;
  y += first * kStep;
  ROTARY_EXPORT_INDEPENDENT
  for (int64_t i = 0; i < count; ++i) {
    const C x1 = Load(x[i * kStep]);
    const C x2 = Load(x[i * kStep + partner]);
    C x1_cos = RoundProduct(x1 * cos[i]);
    C x2_sin = RoundProduct(x2 * sin[i]);
    C x2_cos = RoundProduct(x2 * cos[i]);
    C x1_sin = RoundProduct(x1 * sin[i]);
    if constexpr (kScaled) {
      x1_cos = RoundProduct(x1_cos * scale[i]);
      x2_sin = RoundProduct(x2_sin * scale[i]);
      x2_cos = RoundProduct(x2_cos * scale[i]);
      x1_sin = RoundProduct(x1_sin * scale[i]);
    }
    Store(x1_cos - x2_sin, &y[i * kStep]);
    Store(x2_cos + x1_sin, &y[i * kStep + partner]);
  }
}

template <typename T, typename C>
void RotateHeads(const RotaryParams& params, const Heads& heads, int64_t batch, int64_t row,
                 const TablePiece<C>& table, int64_t first, int64_t count) {
  const auto rotate =
      params.interleaved
          ? (table.scale ? RotatePairs<true, true, T, C> : RotatePairs<true, false, T, C>)
          : (table.scale ? RotatePairs<false, true, T, C> : RotatePairs<false, false, T, C>);
  const HeadStrides& from = heads.in_strides;
  const HeadStrides& to = heads.out_strides;
  const T* in = static_cast<const T*>(heads.in) + batch * from.batch + row * from.row;
  T* out = static_cast<T*>(heads.out) + batch * to.batch + row * to.row;
  for (int64_t head = 0; head < heads.count; ++head) {
    rotate(in + head * from.head, out + head * to.head, table, params.rotary_dim / 2, first, count);
  }
}

// Copies the channels past rotary_dim, bit by bit.
template <typename T>
void CopyTail(const RotaryParams& params, const Heads& heads, int64_t batch, int64_t row) {
  const int64_t tail = params.head_dim - params.rotary_dim;
  if (tail == 0 || heads.in == heads.out) return;
  const HeadStrides& from = heads.in_strides;
  const HeadStrides& to = heads.out_strides;
  const T* in = static_cast<const T*>(heads.in) + batch * from.batch + row * from.row;
  T* out = static_cast<T*>(heads.out) + batch * to.batch + row * to.row;
  for (int64_t head = 0; head < heads.count; ++head) {
    std::memcpy(out + head * to.head + params.rotary_dim, in + head * from.head + params.rotary_dim,
                static_cast<size_t>(tail) * sizeof(T));
  }
}

// Rotates one row of every query and key head; they share the lookup of the table row.
template <typename T, typename Table>
void RotateRow(const RotaryParams& params, int64_t batch, int64_t row) {
  using C = decltype(Load(T()));
  C cos_buffer[kMaxPairs], sin_buffer[kMaxPairs], scale_buffer[kMaxPairs], inverse[kMaxPairs];
  const int64_t half = params.rotary_dim / 2;
  const int64_t table_row = FindTableRow(params, batch, row) * half;
  for (int64_t first = 0; first < half; first += kMaxPairs) {
    const int64_t count = half - first < kMaxPairs ? half - first : kMaxPairs;
    const int64_t entry = table_row + first;
    TablePiece<C> table;
    table.cos = LoadTable<C, Table>(params.cos_cache, entry, count, cos_buffer);
    table.sin = LoadTable<C, Table>(params.sin_cache, entry, count, sin_buffer);
    table.scale = nullptr;
    if (params.scale_cache != nullptr) {
      table.scale = LoadTable<C, Table>(params.scale_cache, entry, count, scale_buffer);
    }
    RotateHeads<T, C>(params, params.query, batch, row, table, first, count);
    if (params.key.count == 0) continue;
    if (table.scale != nullptr) {
      // xPos scales keys by the reciprocal, rounded once, as eager's `scale ** -1` is.
      for (int64_t i = 0; i < count; ++i) inverse[i] = C(1) / table.scale[i];
      table.scale = inverse;
    }
    RotateHeads<T, C>(params, params.key, batch, row, table, first, count);
  }
  CopyTail<T>(params, params.query, batch, row);
  CopyTail<T>(params, params.key, batch, row);
}

template <typename T, typename Table>
void RotateRowsOf(const RotaryParams& params, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    RotateRow<T, Table>(params, i / params.seq_len, i % params.seq_len);
  }
}

}  // namespace

void RotateRows(const RotaryParams& params, int64_t begin, int64_t end) {
  const bool float_tables = params.table_type == DataType::kFloat32;
  switch (params.x_type) {
    case DataType::kFloat32:
      return RotateRowsOf<float, float>(params, begin, end);
    case DataType::kFloat16:
      return float_tables ? RotateRowsOf<Float16, float>(params, begin, end)
                          : RotateRowsOf<Float16, Float16>(params, begin, end);
    case DataType::kBFloat16:
      return float_tables ? RotateRowsOf<BFloat16, float>(params, begin, end)
                          : RotateRowsOf<BFloat16, BFloat16>(params, begin, end);
    case DataType::kFloat64:
      return float_tables ? RotateRowsOf<double, float>(params, begin, end)
                          : RotateRowsOf<double, double>(params, begin, end);
  }
}

}  // namespace ROTARY_EXPORT_ISA_NAMESPACE
}  // namespace rotary_export
