#include "kernel/input_checks.h"

#include <cinttypes>

namespace rotary_export {
namespace {

using Tensor = RotaryExportTensor;

bool ToDataType(int32_t type, DataType* out) {
  switch (type) {
    case ROTARY_EXPORT_FLOAT32:
      *out = DataType::kFloat32;
      return true;
    case ROTARY_EXPORT_FLOAT16:
      *out = DataType::kFloat16;
      return true;
    case ROTARY_EXPORT_BFLOAT16:
      *out = DataType::kBFloat16;
      return true;
    case ROTARY_EXPORT_FLOAT64:
      *out = DataType::kFloat64;
      return true;
    default:
      return false;
  }
}

bool CheckTypes(const RotaryExportCall& call, RotaryParams* params, Message* message) {
  const char* x_type = TypeName(call.x->type);
  if (!ToDataType(call.x->type, &params->x_type)) {
    return Fail(message, "X must be float32, float16, bfloat16 or float64, got %s", x_type);
  }
  const int32_t table_type = call.cos_cache->type;
  if (table_type != call.x->type && table_type != ROTARY_EXPORT_FLOAT32) {
    const bool is_float = call.x->type == ROTARY_EXPORT_FLOAT32;
    return Fail(message, "cos_cache must be %s%s with X %s, got %s", x_type,
                is_float ? "" : " or float32", x_type, TypeName(table_type));
  }
  ToDataType(table_type, &params->table_type);
  const char* names[] = {"sin_cache", "scale_cache"};
  const Tensor* tables[] = {call.sin_cache, call.scale_cache};
  for (int i = 0; i < 2; ++i) {
    if (tables[i] != nullptr && tables[i]->type != table_type) {
      return Fail(message, "%s must have the type of cos_cache, got %s and %s", names[i],
                  TypeName(tables[i]->type), TypeName(table_type));
    }
  }
  if (call.key != nullptr && call.key->type != call.x->type) {
    return Fail(message, "key must be %s with X %s, got %s", x_type, x_type,
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

bool CheckTables(const RotaryExportCall& call, RotaryParams* params, Message* message) {
  const Tensor& cos = *call.cos_cache;
  const int64_t batch_size = params->batch_size;
  const int64_t seq_len = params->seq_len;
  const int64_t half = params->rotary_dim / 2;
  if (call.position_ids != nullptr) {
    const Tensor& ids = *call.position_ids;
    if (cos.rank != 2 || cos.shape[1] != half) {
      return Fail(message,
                  "with position_ids, cos_cache must have shape (max_seq_len, rotary_dim / 2) = "
                  "(max_seq_len, %" PRId64 "), got %s",
                  half, FormatShape(cos).text);
    }
    if (HasShape(ids, 2, batch_size, seq_len)) {
      params->id_batch_stride = seq_len;
      params->id_row_stride = 1;
    } else if (HasShape(ids, 2, 1, seq_len)) {
      params->id_row_stride = 1;
    } else if (HasShape(ids, 1, 1)) {
      params->table_row_step = 1;
    } else {
      return Fail(message,
                  "position_ids must have shape (batch_size, seq_len), (1, seq_len) or (1,), got "
                  "%s with batch_size=%" PRId64 ", seq_len=%" PRId64,
                  FormatShape(ids).text, batch_size, seq_len);
    }
    params->position_ids = static_cast<const int64_t*>(ids.data);
    params->table_rows = cos.shape[0];
  } else {
    params->table_row_step = 1;
    if (HasShape(cos, 3, batch_size, seq_len, half)) {
      params->table_batch_step = seq_len;
    } else if (!HasShape(cos, 3, 1, seq_len, half)) {
      return Fail(message,
                  "without position_ids, cos_cache must have shape (batch_size or 1, seq_len, "
                  "rotary_dim / 2) = (%" PRId64 " or 1, %" PRId64 ", %" PRId64 "), got %s",
                  batch_size, seq_len, half, FormatShape(cos).text);
    }
  }
  const char* names[] = {"sin_cache", "scale_cache"};
  const Tensor* tables[] = {call.sin_cache, call.scale_cache};
  for (int i = 0; i < 2; ++i) {
    if (tables[i] != nullptr && !SameShape(*tables[i], cos)) {
      return Fail(message, "%s must have the shape of cos_cache, got %s and %s", names[i],
                  FormatShape(*tables[i]).text, FormatShape(cos).text);
    }
  }
  return true;
}

bool CheckKey(const RotaryExportCall& call, const HeadShape& x, RotaryParams* params,
              Message* message) {
  if (call.key->rank != call.x->rank) {
    return Fail(message, "key must have as many dimensions as X, got %s and %s",
                FormatShape(*call.key).text, FormatShape(*call.x).text);
  }
  HeadShape key;
  if (!SplitHeads("key", *call.key, "kv_num_heads", call.kv_num_heads, &key, message)) return false;
  const int64_t got[] = {key.batch_size, key.seq_len, key.head_dim};
  const int64_t want[] = {x.batch_size, x.seq_len, x.head_dim};
  if (got[0] != want[0] || got[1] != want[1] || got[2] != want[2]) {
    return Fail(message, "key must have X's batch_size, seq_len and head_dim, got %s and %s",
                FormatDims(got, 3).text, FormatDims(want, 3).text);
  }
  params->key.in = call.key->data;
  params->key.count = key.num_heads;
  params->key.in_strides = key.strides;
  return true;
}

// Checks that the last `dims` dimensions lie in memory without gaps.
bool CheckContiguous(const char* name, const Tensor* tensor, int dims, Message* message) {
  if (tensor == nullptr) return true;
  for (int i = 0; i < tensor->rank; ++i) {
    if (tensor->shape[i] == 0) return true;  // NumPy gives an empty array strides of 0.
  }
  int64_t stride = 1;
  for (int i = tensor->rank - 1; i >= 0 && i >= tensor->rank - dims; --i) {
    if (tensor->shape[i] > 1 && tensor->strides[i] != stride) {
      return Fail(message, "%s must be contiguous%s, got strides %s for shape %s", name,
                  dims == 1 ? " in its last dimension" : "",
                  FormatDims(tensor->strides, tensor->rank).text, FormatShape(*tensor).text);
    }
    stride *= tensor->shape[i];
  }
  return true;
}

bool CheckOutput(const char* name, const char* input_name, const Tensor* input,
                 const Tensor* output, int64_t num_heads, Heads* heads, Message* message) {
  if ((input == nullptr) != (output == nullptr)) {
    return Fail(message, "%s must be given if and only if %s is, got %s but no %s", name,
                input_name, input ? input_name : name, input ? name : input_name);
  }
  if (input == nullptr) return true;
  if (output->type != input->type || !SameShape(*output, *input)) {
    return Fail(message, "%s must have the type and shape of %s, got %s %s and %s %s", name,
                input_name, TypeName(output->type), FormatShape(*output).text,
                TypeName(input->type), FormatShape(*input).text);
  }
  HeadShape shape;
  if (!CheckContiguous(name, output, 1, message)) return false;
  if (!SplitHeads(name, *output, "num_heads", num_heads, &shape, message)) return false;
  heads->out = output->data;
  heads->out_strides = shape.strides;
  return true;
}

bool BadPosition(const RotaryParams& params, int64_t position, int64_t batch, int64_t row,
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
  if (!CheckTypes(call, params, message)) return false;

  HeadShape x;
  if (!SplitHeads("X", *call.x, "num_heads", call.num_heads, &x, message)) return false;
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
  if (!CheckTables(call, params, message)) return false;
  params->cos_cache = call.cos_cache->data;
  params->sin_cache = call.sin_cache->data;
  params->scale_cache = call.scale_cache != nullptr ? call.scale_cache->data : nullptr;
  if (call.key != nullptr && !CheckKey(call, x, params, message)) return false;

  return CheckContiguous("X", call.x, 1, message) && CheckContiguous("key", call.key, 1, message) &&
         CheckContiguous("cos_cache", call.cos_cache, 3, message) &&
         CheckContiguous("sin_cache", call.sin_cache, 3, message) &&
         CheckContiguous("scale_cache", call.scale_cache, 3, message) &&
         CheckContiguous("position_ids", call.position_ids, 2, message);
}

bool CheckPositions(const RotaryParams& params, Message* message) {
  const int64_t* ids = params.position_ids;
  if (ids == nullptr || params.batch_size == 0 || params.seq_len == 0) return true;
  const int64_t rows = params.table_rows;
  if (params.id_row_stride == 0) {
    // An offset: every batch entry uses offset, offset + 1, ... No sum here can overflow.
    const int64_t offset = ids[0];
    if (offset < 0 || offset >= rows) return BadPosition(params, offset, 0, 0, message);
    const int64_t fitting = rows - offset;
    return params.seq_len <= fitting || BadPosition(params, rows, 0, fitting, message);
  }
  const int64_t count = params.seq_len * (params.id_batch_stride ? params.batch_size : 1);
  for (int64_t i = 0; i < count; ++i) {
    if (ids[i] < 0 || ids[i] >= rows) {
      return BadPosition(params, ids[i], i / params.seq_len, i % params.seq_len, message);
    }
  }
  return true;
}

bool CheckOutputs(const RotaryExportCall& call, RotaryParams* params, Message* message) {
  if (call.y == nullptr) return Fail(message, "Y must be given");
  return CheckOutput("Y", "X", call.x, call.y, params->query.count, &params->query, message) &&
         CheckOutput("key_out", "key", call.key, call.key_out, params->key.count, &params->key,
                     message);
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
