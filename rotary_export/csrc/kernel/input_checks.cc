#include "kernel/input_checks.h"

#include <cinttypes>

namespace rotary_export {
namespace {

using Tensor = RotaryExportTensor;

struct NamedTensor {
  const char* name;
  const Tensor* tensor;  // Null: not given.
};

bool IsTypePair(int32_t x_type, int32_t table_type) {
  for (const TypePair& pair : kTypePairs) {
    if (pair.x_type == x_type && pair.table_type == table_type) return true;
  }
  return false;
}

// Reports the type of X if no pair has it, else the type of the tables.
bool FailTypePair(int32_t x_type, int32_t table_type, Message* message) {
  RotaryExportType x_types[kTypePairCount];
  RotaryExportType table_types[kTypePairCount];
  int x_count = 0;
  int table_count = 0;
  for (const TypePair& pair : kTypePairs) {
    if (pair.x_type == x_type) table_types[table_count++] = pair.table_type;
    if (x_count == 0 || x_types[x_count - 1] != pair.x_type) x_types[x_count++] = pair.x_type;
  }
  if (table_count == 0) {
    return Fail(message, "X must be %s, got %s", FormatTypes(x_types, x_count).text,
                TypeName(x_type));
  }
  return Fail(message, "cos_cache must be %s with X %s, got %s",
              FormatTypes(table_types, table_count).text, TypeName(x_type), TypeName(table_type));
}

bool CheckTypes(const RotaryExportCall& call, RotaryParams* params, Message* message) {
  const int32_t x_type = call.x->type;
  const int32_t table_type = call.cos_cache->type;
  if (!IsTypePair(x_type, table_type)) return FailTypePair(x_type, table_type, message);
  params->x_type = static_cast<RotaryExportType>(x_type);
  params->table_type = static_cast<RotaryExportType>(table_type);
  const NamedTensor tables[] = {{"sin_cache", call.sin_cache}, {"scale_cache", call.scale_cache}};
  for (const auto& [name, table] : tables) {
    if (table != nullptr && table->type != table_type) {
      return Fail(message, "%s must have the type of cos_cache, got %s and %s", name,
                  TypeName(table->type), TypeName(table_type));
    }
  }
  if (call.key != nullptr && call.key->type != x_type) {
    return Fail(message, "key must be %s with X %s, got %s", TypeName(x_type), TypeName(x_type),
                TypeName(call.key->type));
  }
  if (call.position_ids != nullptr && call.position_ids->type != ROTARY_EXPORT_INT64) {
    return Fail(message, "position_ids must be int64, got %s", TypeName(call.position_ids->type));
  }
  return true;
}

// The sizes of a (B, N, S, H) or (B, S, N*H) tensor, and how to walk it.
struct HeadShape {
  int64_t batch_size;
  int64_t num_heads;
  int64_t seq_len;
  int64_t head_dim;
  HeadStrides strides;
};

bool SplitHeads(const char* name, const Tensor& tensor, const char* attribute, int64_t heads,
                HeadShape* out, Message* message) {
  const int64_t* shape = tensor.shape;
  const int64_t* strides = tensor.strides;
  if (tensor.rank == 4) {
    *out = {shape[0], shape[1], shape[2], shape[3], {strides[0], strides[1], strides[2]}};
    return true;
  }
  if (tensor.rank != 3) {
    return Fail(message, "%s must have 3 or 4 dimensions, got shape %s", name,
                FormatShape(tensor).text);
  }
  if (heads <= 0 || shape[2] % heads != 0) {
    return Fail(message,
                "%s must be positive and divide the last dimension of a 3-D %s, got %s=%" PRId64
                ", %s of shape %s",
                attribute, name, attribute, heads, name, FormatShape(tensor).text);
  }
  const int64_t head_dim = shape[2] / heads;
  *out = {shape[0], heads, shape[1], head_dim, {strides[0], head_dim, strides[1]}};
  return true;
}

bool HasShape(const Tensor& tensor, int rank, int64_t d0, int64_t d1 = 0, int64_t d2 = 0) {
  const int64_t dims[] = {d0, d1, d2};
  if (tensor.rank != rank) return false;
  for (int i = 0; i < rank; ++i) {
    if (tensor.shape[i] != dims[i]) return false;
  }
  return true;
}

bool SameShape(const Tensor& a, const Tensor& b) {
  if (a.rank != b.rank) return false;
  for (int i = 0; i < a.rank && i < ROTARY_EXPORT_MAX_RANK; ++i) {
    if (a.shape[i] != b.shape[i]) return false;
  }
  return true;
}

bool SetQuery(const RotaryExportCall& call, const HeadShape& x, RotaryParams* params,
              Message* message) {
  const int64_t rotary_dim = call.rotary_embedding_dim ? call.rotary_embedding_dim : x.head_dim;
  if (rotary_dim < 2 || rotary_dim % 2 != 0 || rotary_dim > x.head_dim) {
    return Fail(message,
                "rotary_dim must be even and <= head_dim, got rotary_dim=%" PRId64
                ", head_dim=%" PRId64,
                rotary_dim, x.head_dim);
  }
  params->batch_size = x.batch_size;
  params->seq_len = x.seq_len;
  params->head_dim = x.head_dim;
  params->rotary_dim = rotary_dim;
  params->query.in = call.x->data;
  params->query.count = x.num_heads;
  params->query.in_strides = x.strides;
  return true;
}

// Tables of table_rows rows, which position_ids select from.
bool CheckTablesWithIds(const RotaryExportCall& call, RotaryParams* params, Message* message) {
  const Tensor& cos = *call.cos_cache;
  const Tensor& ids = *call.position_ids;
  const int64_t half = params->rotary_dim / 2;
  if (cos.rank != 2 || cos.shape[1] != half) {
    return Fail(message,
                "with position_ids, cos_cache must have shape (max_seq_len, rotary_dim / 2) = "
                "(max_seq_len, %" PRId64 "), got %s",
                half, FormatShape(cos).text);
  }
  if (HasShape(ids, 2, params->batch_size, params->seq_len)) {
    params->id_batch_stride = params->seq_len;
    params->id_row_stride = 1;
  } else if (HasShape(ids, 2, 1, params->seq_len)) {
    params->id_row_stride = 1;
  } else if (HasShape(ids, 1, 1)) {
    params->table_row_step = 1;
  } else {
    return Fail(message,
                "position_ids must have shape (batch_size, seq_len), (1, seq_len) or (1,), got "
                "%s with batch_size=%" PRId64 ", seq_len=%" PRId64,
                FormatShape(ids).text, params->batch_size, params->seq_len);
  }
  params->position_ids = static_cast<const int64_t*>(ids.data);
  params->table_rows = cos.shape[0];
  return true;
}

// Tables that have one row for each row of X.
bool CheckTablesWithoutIds(const RotaryExportCall& call, RotaryParams* params, Message* message) {
  const Tensor& cos = *call.cos_cache;
  const int64_t batch_size = params->batch_size;
  const int64_t seq_len = params->seq_len;
  const int64_t half = params->rotary_dim / 2;
  params->table_row_step = 1;
  if (HasShape(cos, 3, batch_size, seq_len, half)) {
    params->table_batch_step = seq_len;
  } else if (!HasShape(cos, 3, 1, seq_len, half)) {
    return Fail(message,
                "without position_ids, cos_cache must have shape (batch_size or 1, seq_len, "
                "rotary_dim / 2) = (%" PRId64 " or 1, %" PRId64 ", %" PRId64 "), got %s",
                batch_size, seq_len, half, FormatShape(cos).text);
  }
  return true;
}

bool CheckTables(const RotaryExportCall& call, RotaryParams* params, Message* message) {
  const auto check_cos = call.position_ids != nullptr ? CheckTablesWithIds : CheckTablesWithoutIds;
  if (!check_cos(call, params, message)) return false;
  const NamedTensor tables[] = {{"sin_cache", call.sin_cache}, {"scale_cache", call.scale_cache}};
  for (const auto& [name, table] : tables) {
    if (table != nullptr && !SameShape(*table, *call.cos_cache)) {
      return Fail(message, "%s must have the shape of cos_cache, got %s and %s", name,
                  FormatShape(*table).text, FormatShape(*call.cos_cache).text);
    }
  }
  params->cos_cache = call.cos_cache->data;
  params->sin_cache = call.sin_cache->data;
  params->scale_cache = call.scale_cache != nullptr ? call.scale_cache->data : nullptr;
  return true;
}

bool CheckKey(const RotaryExportCall& call, const HeadShape& x, RotaryParams* params,
              Message* message) {
  if (call.key == nullptr) return true;
  if (call.key->rank != call.x->rank) {
    return Fail(message, "key must have as many dimensions as X, got %s and %s",
                FormatShape(*call.key).text, FormatShape(*call.x).text);
  }
  HeadShape key;
  if (!SplitHeads("key", *call.key, "kv_num_heads", call.kv_num_heads, &key, message)) return false;
  const int64_t got[] = {key.batch_size, key.seq_len, key.head_dim};
  const int64_t expected[] = {x.batch_size, x.seq_len, x.head_dim};
  if (got[0] != expected[0] || got[1] != expected[1] || got[2] != expected[2]) {
    return Fail(message, "key must have X's batch_size, seq_len and head_dim, got %s and %s",
                FormatDims(got, 3).text, FormatDims(expected, 3).text);
  }
  params->key.in = call.key->data;
  params->key.count = key.num_heads;
  params->key.in_strides = key.strides;
  return true;
}

// Checks that the last `dims` dimensions lie in memory without gaps.
bool CheckContiguous(const NamedTensor& named, int dims, Message* message) {
  const Tensor* tensor = named.tensor;
  if (tensor == nullptr) return true;
  for (int i = 0; i < tensor->rank; ++i) {
    if (tensor->shape[i] == 0) return true;  // In NumPy, empty arrays have strides of 0.
  }
  int64_t stride = 1;
  for (int i = tensor->rank - 1; i >= 0 && i >= tensor->rank - dims; --i) {
    if (tensor->shape[i] > 1 && tensor->strides[i] != stride) {
      return Fail(message, "%s must be contiguous%s, got strides %s for shape %s", named.name,
                  dims == 1 ? " in its last dimension" : "",
                  FormatDims(tensor->strides, tensor->rank).text, FormatShape(*tensor).text);
    }
    stride *= tensor->shape[i];
  }
  return true;
}

// What the kernel walks by strides needs a contiguous last dimension; the rest has no strides.
bool CheckInputsContiguous(const RotaryExportCall& call, Message* message) {
  return CheckContiguous({"X", call.x}, 1, message) &&
         CheckContiguous({"key", call.key}, 1, message) &&
         CheckContiguous({"cos_cache", call.cos_cache}, 3, message) &&
         CheckContiguous({"sin_cache", call.sin_cache}, 3, message) &&
         CheckContiguous({"scale_cache", call.scale_cache}, 3, message) &&
         CheckContiguous({"position_ids", call.position_ids}, 2, message);
}

bool CheckOutput(const NamedTensor& in, const NamedTensor& out, Heads* heads, Message* message) {
  if ((in.tensor == nullptr) != (out.tensor == nullptr)) {
    const bool has_input = in.tensor != nullptr;
    return Fail(message, "%s must be given if and only if %s is, got %s but no %s", out.name,
                in.name, has_input ? in.name : out.name, has_input ? out.name : in.name);
  }
  if (in.tensor == nullptr) return true;
  if (out.tensor->type != in.tensor->type || !SameShape(*out.tensor, *in.tensor)) {
    return Fail(message, "%s must have the type and shape of %s, got %s %s and %s %s", out.name,
                in.name, TypeName(out.tensor->type), FormatShape(*out.tensor).text,
                TypeName(in.tensor->type), FormatShape(*in.tensor).text);
  }
  HeadShape shape;
  if (!CheckContiguous(out, 1, message)) return false;
  if (!SplitHeads(out.name, *out.tensor, "num_heads", heads->count, &shape, message)) return false;
  heads->out = out.tensor->data;
  heads->out_strides = shape.strides;
  return true;
}

bool FailPosition(const RotaryParams& params, int64_t position, int64_t batch, int64_t row,
                  Message* message) {
  return Fail(message,
              "position_ids must be in [0, %" PRId64 "), got %" PRId64 " at batch %" PRId64
              ", row %" PRId64,
              params.table_rows, position, batch, row);
}

}  // namespace

bool CheckInputs(const RotaryExportCall& call, RotaryParams* params, Message* message) {
  if (call.x == nullptr || call.cos_cache == nullptr || call.sin_cache == nullptr) {
    return Fail(message, "X, cos_cache and sin_cache must be given");
  }
  *params = {};
  params->interleaved = call.interleaved != 0;
  HeadShape x;
  return CheckTypes(call, params, message) &&
         SplitHeads("X", *call.x, "num_heads", call.num_heads, &x, message) &&
         SetQuery(call, x, params, message) && CheckTables(call, params, message) &&
         CheckKey(call, x, params, message) && CheckInputsContiguous(call, message);
}

bool CheckPositions(const RotaryParams& params, Message* message) {
  const int64_t* ids = params.position_ids;
  if (ids == nullptr || params.batch_size == 0 || params.seq_len == 0) return true;
  const int64_t rows = params.table_rows;
  if (params.id_row_stride == 0) {
    // An offset: every batch entry uses offset, offset + 1, ... No sum here can overflow.
    const int64_t offset = ids[0];
    if (offset < 0 || offset >= rows) return FailPosition(params, offset, 0, 0, message);
    const int64_t fitting = rows - offset;
    return params.seq_len <= fitting || FailPosition(params, rows, 0, fitting, message);
  }
  const int64_t count = params.seq_len * (params.id_batch_stride ? params.batch_size : 1);
  for (int64_t i = 0; i < count; ++i) {
    if (ids[i] < 0 || ids[i] >= rows) {
      return FailPosition(params, ids[i], i / params.seq_len, i % params.seq_len, message);
    }
  }
  return true;
}

bool CheckOutputs(const RotaryExportCall& call, RotaryParams* params, Message* message) {
  if (call.y == nullptr) return Fail(message, "Y must be given");
  return CheckOutput({"X", call.x}, {"Y", call.y}, &params->query, message) &&
         CheckOutput({"key", call.key}, {"key_out", call.key_out}, &params->key, message);
}

bool CheckCall(const RotaryExportCall& call, RotaryParams* params, Message* message) {
  return CheckInputs(call, params, message) && CheckOutputs(call, params, message) &&
         CheckPositions(*params, message);
}

void SetContiguous(RotaryExportTensor* tensor) {
  int64_t stride = 1;
  for (int i = tensor->rank - 1; i >= 0; --i) {
    if (i >= ROTARY_EXPORT_MAX_RANK) continue;
    tensor->strides[i] = stride;
    stride *= tensor->shape[i];
  }
}

}  // namespace rotary_export
