"""`rotary_export::RotaryEmbedding`, version 1: its names, types and input checks, stated once.

The op is a strict superset of `ai.onnx::RotaryEmbedding-23`: any node of that op is valid here once
its domain is changed. The Python implementations import this file. `csrc/kernel/input_checks.cc`
contains the same checks and messages; `tests/op/test_op_library.py` compares the two.
Pure Python: no torch, no onnx.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rotary_export.errors import RotaryExportError

DOMAIN = "rotary_export"
OP_TYPE = "RotaryEmbedding"
OP_VERSION = 1

INPUTS = ("X", "cos_cache", "sin_cache", "position_ids", "key", "scale_cache")
OUTPUTS = ("Y", "key_out")
REQUIRED_INPUTS = 3
ATTRIBUTES = ("interleaved", "rotary_embedding_dim", "num_heads", "kv_num_heads")  # ints, default 0

# (type of X, key and the outputs; type of the tables): tables are X's own type, or float32.
TYPE_PAIRS = (
    ("float32", "float32"),
    ("float16", "float16"),
    ("float16", "float32"),
    ("bfloat16", "bfloat16"),
    ("bfloat16", "float32"),
    ("float64", "float64"),
    ("float64", "float32"),
)
X_TYPES = tuple(dict.fromkeys(x for x, _ in TYPE_PAIRS))

# The oldest ONNX Runtime whose ai.onnx::RotaryEmbedding checks position_ids: 1.24 reads outside the
# tables. Older ones refuse a 4-D X without num_heads.
MINIMUM_NATIVE_ORT = "1.25"

Shape = Sequence[int]


@dataclass(frozen=True)
class CallSizes:
    """The sizes of one call, checked.

    Attributes:
        batch_size: B.
        seq_len: S.
        num_heads: N, heads of X.
        kv_num_heads: Heads of `key`; 0 without a key.
        head_dim: H.
        rotary_dim: Channels of a head that are rotated; even, <= head_dim.
        table_rows: M, rows of a 2-D table; 0 for 3-D tables.
    """

    batch_size: int
    seq_len: int
    num_heads: int
    kv_num_heads: int
    head_dim: int
    rotary_dim: int
    table_rows: int


def _split_heads(name: str, shape: Shape, attribute: str, heads: int) -> tuple[int, int, int, int]:
    """Return (B, N, S, H) of a (B, N, S, H) or (B, S, N*H) shape."""
    if len(shape) == 4:
        return shape[0], shape[1], shape[2], shape[3]
    if len(shape) != 3:
        raise RotaryExportError(f"{name} must have 3 or 4 dimensions, got shape {tuple(shape)}")
    if heads <= 0 or shape[2] % heads:
        raise RotaryExportError(
            f"{attribute} must be positive and divide the last dimension of a 3-D {name}, "
            f"got {attribute}={heads}, {name} of shape {tuple(shape)}"
        )
    return shape[0], heads, shape[1], shape[2] // heads


def shape_of(value: Any) -> Shape | None:
    """Return the shape of an array or tensor; None if the input is not given."""
    return None if value is None else tuple(value.shape)


def check_inputs(
    shapes: Sequence[Shape | None],
    *,
    rotary_embedding_dim: int = 0,
    num_heads: int = 0,
    kv_num_heads: int = 0,
) -> CallSizes:
    """Check the shapes of one call and return its sizes.

    Args:
        shapes: Of the inputs, in the order of INPUTS; None: not given.
            X: (B, N, S, H), or (B, S, N*H) with `num_heads`.
            cos_cache, sin_cache: (M, R/2) with `position_ids`, else (B, S, R/2) or (1, S, R/2).
            position_ids: (B, S), (1, S) or (1,); not given: tables hold one row per position.
            key: As X, with its own number of heads.
            scale_cache: As cos_cache; not given: no xPos.
        rotary_embedding_dim: R; 0 means all of H.
        num_heads: Heads of a 3-D X.
        kv_num_heads: Heads of a 3-D key.

    Returns:
        The sizes.

    Raises:
        RotaryExportError: A shape or an attribute does not fit. The message contains what must hold
            and what was given.
    """
    x, cos_cache, sin_cache, position_ids, key, scale_cache = shapes
    assert x is not None
    assert cos_cache is not None
    batch, heads, seq_len, head_dim = _split_heads("X", x, "num_heads", num_heads)
    rotary_dim = rotary_embedding_dim or head_dim
    check_rotary_dim(rotary_dim, head_dim)

    half = rotary_dim // 2
    if position_ids is not None:
        if len(cos_cache) != 2 or cos_cache[1] != half:
            raise RotaryExportError(
                "with position_ids, cos_cache must have shape (max_seq_len, rotary_dim / 2) = "
                f"(max_seq_len, {half}), got {tuple(cos_cache)}"
            )
        if tuple(position_ids) not in {(batch, seq_len), (1, seq_len), (1,)}:
            raise RotaryExportError(
                "position_ids must have shape (batch_size, seq_len), (1, seq_len) or (1,), got "
                f"{tuple(position_ids)} with batch_size={batch}, seq_len={seq_len}"
            )
    elif tuple(cos_cache) not in {(batch, seq_len, half), (1, seq_len, half)}:
        raise RotaryExportError(
            "without position_ids, cos_cache must have shape (batch_size or 1, seq_len, "
            f"rotary_dim / 2) = ({batch} or 1, {seq_len}, {half}), got {tuple(cos_cache)}"
        )
    for name, shape in (("sin_cache", sin_cache), ("scale_cache", scale_cache)):
        if shape is not None and tuple(shape) != tuple(cos_cache):
            raise RotaryExportError(
                f"{name} must have the shape of cos_cache, "
                f"got {tuple(shape)} and {tuple(cos_cache)}"
            )

    kv_heads = 0
    if key is not None:
        if len(key) != len(x):
            raise RotaryExportError(
                f"key must have as many dimensions as X, got {tuple(key)} and {tuple(x)}"
            )
        key_batch, kv_heads, key_len, key_dim = _split_heads(
            "key", key, "kv_num_heads", kv_num_heads
        )
        if (key_batch, key_len, key_dim) != (batch, seq_len, head_dim):
            raise RotaryExportError(
                "key must have X's batch_size, seq_len and head_dim, "
                f"got {(key_batch, key_len, key_dim)} and {(batch, seq_len, head_dim)}"
            )
    rows = cos_cache[0] if position_ids is not None else 0
    return CallSizes(batch, seq_len, heads, kv_heads, head_dim, rotary_dim, rows)


def check_rotary_dim(rotary_dim: int, head_dim: int) -> None:
    """Check the number of rotated channels.

    Raises:
        RotaryExportError: `rotary_dim` is not even, < 2 or > `head_dim`.
    """
    if rotary_dim < 2 or rotary_dim % 2 or rotary_dim > head_dim:
        raise RotaryExportError(
            "rotary_dim must be even and <= head_dim, "
            f"got rotary_dim={rotary_dim}, head_dim={head_dim}"
        )


def mismatched_table_message(name: str, got: str, cos_type: str) -> str:
    """Return the message for a table whose type is not that of cos_cache.

    Args:
        name: The table.
        got: Its type.
        cos_type: The type of cos_cache.
    """
    return f"{name} must have the type of cos_cache, got {got} and {cos_type}"


def bad_id_type_message(got: str) -> str:
    """Return the message for position_ids that are not int64.

    Args:
        got: Their type.
    """
    return f"position_ids must be int64, got {got}"


def bad_id_message(bad_id: int, batch: int, row: int, table_rows: int) -> str:
    """Return the message for a position outside the tables.

    Args:
        bad_id: The first position outside [0, table_rows), in row-major order.
        batch: Its batch index.
        row: Its row, in [0, seq_len).
        table_rows: M.
    """
    return f"position_ids must be in [0, {table_rows}), got {bad_id} at batch {batch}, row {row}"


def bad_x_type_message(got: str) -> str:
    """Return the message for an X of an unsupported type.

    Args:
        got: Its type.
    """
    return f"X must be {', '.join(X_TYPES[:-1])} or {X_TYPES[-1]}, got {got}"


def bad_type_message(name: str, got: str, x_type: str) -> str:
    """Return the message for a table or key whose type does not match X's.

    Args:
        name: The input.
        got: Its type.
        x_type: The type of X.
    """
    accepted = x_type if name == "key" else " or ".join(t for x, t in TYPE_PAIRS if x == x_type)
    return f"{name} must be {accepted} with X {x_type}, got {got}"
