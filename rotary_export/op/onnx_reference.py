"""The op for the ONNX reference evaluator, in numpy: independent of torch and of our kernel.

Usage: `onnx.reference.ReferenceEvaluator(model, new_ops=[RotaryEmbedding])`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from onnx.reference.op_run import OpRun

from rotary_export.errors import RotaryExportError
from rotary_export.op import spec
from rotary_export.types import Array


class RotaryEmbedding(OpRun):
    """`rotary_export::RotaryEmbedding`, version 1; `op/spec.py` has its shapes and errors."""

    op_domain = spec.DOMAIN

    def _run(
        self,
        x: Array,
        cos_cache: Array,
        sin_cache: Array,
        position_ids: Array | None = None,
        key: Array | None = None,
        scale_cache: Array | None = None,
        *,
        interleaved: int = 0,
        rotary_embedding_dim: int = 0,
        num_heads: int = 0,
        kv_num_heads: int = 0,
        **_: Any,
    ) -> tuple[Array, ...]:
        sizes = spec.check_inputs(
            [*map(spec.shape_of, (x, cos_cache, sin_cache, position_ids, key, scale_cache))],
            rotary_embedding_dim=rotary_embedding_dim or 0,
            num_heads=num_heads or 0,
            kv_num_heads=kv_num_heads or 0,
        )
        dtype = np.float64 if x.dtype == np.float64 else np.float32
        tables = [t.astype(dtype) for t in (cos_cache, sin_cache, scale_cache) if t is not None]
        if position_ids is not None:
            positions = _compute_positions(position_ids, sizes)
            tables = [table[positions] for table in tables]  # (B or 1, S, R/2)
        cos, sin = tables[:2]
        scale = tables[2] if scale_cache is not None else None
        y = _rotate(x, cos, sin, scale, sizes.num_heads, bool(interleaved))
        if key is None:
            return (y,)
        inverse = None if scale is None else np.reciprocal(scale)
        return y, _rotate(key, cos, sin, inverse, sizes.kv_num_heads, bool(interleaved))


def _compute_positions(position_ids: Array, sizes: spec.CallSizes) -> Array:
    """Return (B or 1, S) positions, all within the tables."""
    positions = position_ids
    if position_ids.ndim == 1:
        positions = position_ids[:, None] + np.arange(sizes.seq_len)
    if sizes.batch_size == 0:  # no rows, so no positions
        positions = positions[:0]
    bad = np.argwhere((positions < 0) | (positions >= sizes.table_rows))
    if len(bad):
        batch, row = bad[0]
        raise RotaryExportError(
            spec.bad_id_message(positions[batch, row], batch, row, sizes.table_rows)
        )
    return positions


def _rotate(
    x: Array, cos: Array, sin: Array, scale: Array | None, num_heads: int, interleaved: bool
) -> Array:
    """Rotate (B, N, S, H) or (B, S, N*H) by tables of (B or 1, S, R/2)."""
    # X is viewed as (B, S, N, H), the tables as (B or 1, S, 1, R/2).
    if x.ndim == 4:
        heads = x.swapaxes(1, 2)
    else:
        heads = x.reshape(*x.shape[:2], num_heads, x.shape[2] // num_heads)
    cos, sin = cos[:, :, None], sin[:, :, None]
    half = cos.shape[-1]
    first = slice(0, 2 * half, 2) if interleaved else slice(0, half)
    second = slice(1, 2 * half, 2) if interleaved else slice(half, 2 * half)
    a, b = heads[..., first].astype(cos.dtype), heads[..., second].astype(cos.dtype)
    terms = [a * cos, b * sin, b * cos, a * sin]
    if scale is not None:
        terms = [term * scale[:, :, None] for term in terms]
    out = heads.copy()
    out[..., first] = (terms[0] - terms[1]).astype(x.dtype)
    out[..., second] = (terms[2] + terms[3]).astype(x.dtype)
    return out.swapaxes(1, 2) if x.ndim == 4 else out.reshape(x.shape)
