"""`torch.ops.rotary_export.rotary_embedding`: the op in torch, eager, fake and differentiable.

On the CPU, the op library's kernel computes it (`cpu_kernel.py`). Elsewhere, plain aten ops compute
the same bits.

`rotary_embedding` is the same op as a function that `torch.jit.trace` records as plain aten ops.
TorchScript files therefore load where this package is not installed.
"""

from __future__ import annotations

from typing import Any, Optional

import torch
from torch import Tensor

from rotary_export.errors import RotaryExportError
from rotary_export.op import cpu_kernel, spec
from rotary_export.reference import rotate
from rotary_export.types import name_dtype


def _check_types(
    x: Tensor, tables: list[Tensor | None], position_ids: Tensor | None, key: Tensor | None
) -> None:
    x_type = name_dtype(x.dtype)
    if x_type not in spec.X_TYPES:
        raise RotaryExportError(spec.bad_x_type_message(x_type))
    cos, sin, scale = tables
    assert cos is not None
    if (x_type, name_dtype(cos.dtype)) not in spec.TYPE_PAIRS:
        raise RotaryExportError(spec.bad_type_message("cos_cache", name_dtype(cos.dtype), x_type))
    for name, table in (("sin_cache", sin), ("scale_cache", scale)):
        if table is not None and table.dtype != cos.dtype:
            raise RotaryExportError(
                spec.mismatched_table_message(name, name_dtype(table.dtype), name_dtype(cos.dtype))
            )
    if key is not None and key.dtype != x.dtype:
        raise RotaryExportError(spec.bad_type_message("key", name_dtype(key.dtype), x_type))
    if position_ids is not None and position_ids.dtype != torch.int64:
        raise RotaryExportError(spec.bad_id_type_message(name_dtype(position_ids.dtype)))


def _compute_positions(position_ids: Tensor, seq_len: int) -> Tensor:
    """Return (B or 1, S) positions of (B, S), (1, S) or (1,) ids."""
    if position_ids.dim() == 1:
        return position_ids[None, :] + torch.arange(seq_len, device=position_ids.device)
    return position_ids


def _check_position_ids(position_ids: Tensor, seq_len: int, table_rows: int) -> None:
    positions = _compute_positions(position_ids, seq_len)
    bad = (positions < 0) | (positions >= table_rows)
    if bad.any():
        batch, row = (int(i) for i in bad.nonzero()[0])
        message = spec.bad_id_message(int(positions[batch, row]), batch, row, table_rows)
        raise RotaryExportError(message)


def rotary_embedding_aten(
    x: Tensor,
    cos_cache: Tensor,
    sin_cache: Tensor,
    position_ids: Tensor | None = None,
    key: Tensor | None = None,
    scale_cache: Tensor | None = None,
    *,
    interleaved: bool = False,
    rotary_dim: int = 0,
    num_heads: int = 0,
    kv_num_heads: int = 0,
) -> tuple[Tensor, Tensor]:
    """Compute the op with plain aten ops: the fallback of the kernel, and the op's decomposition.

    Arguments and results are those of `rotary_embedding`; `rotary_dim` follows from the tables.
    An id outside the tables is an error here too (`aten::embedding` does not wrap a negative one).
    """
    seq_len = x.shape[-2] if x.dim() == 4 else x.shape[1]
    tables = [cos_cache, sin_cache] + ([] if scale_cache is None else [scale_cache])
    if position_ids is not None:
        positions = _compute_positions(position_ids, seq_len)
        tables = [torch.embedding(table, positions) for table in tables]  # (B or 1, S, R/2)
    cos, sin = tables[0][:, None], tables[1][:, None]  # (B or 1, 1, S, R/2)

    scale: Tensor | None = None
    inverse: Tensor | None = None
    if scale_cache is not None:
        dtype = torch.promote_types(x.dtype, torch.float32)
        scale = tables[2][:, None].to(dtype)
        inverse = scale.reciprocal()
    y = _rotate_heads(x, cos, sin, scale, interleaved, num_heads)
    if key is None:
        return y, x.new_empty(0)
    return y, _rotate_heads(key, cos, sin, inverse, interleaved, kv_num_heads)


def _rotate_heads(
    x: Tensor, cos: Tensor, sin: Tensor, scale: Tensor | None, interleaved: bool, num_heads: int
) -> Tensor:
    """Rotate (B, N, S, H), or (B, S, N*H) with `num_heads`."""
    if x.dim() == 4:
        return rotate(x, cos, sin, scale, interleaved=interleaved)
    split = x.unflatten(-1, (num_heads, -1)).transpose(1, 2)  # (B, N, S, H)
    return rotate(split, cos, sin, scale, interleaved=interleaved).transpose(1, 2).flatten(2)


@torch.library.custom_op("rotary_export::rotary_embedding", mutates_args=())
def _rotary_embedding_op(
    x: Tensor,
    cos_cache: Tensor,
    sin_cache: Tensor,
    position_ids: Optional[Tensor] = None,  # noqa: UP045 (custom_op reads the annotation)
    key: Optional[Tensor] = None,  # noqa: UP045
    scale_cache: Optional[Tensor] = None,  # noqa: UP045
    *,
    interleaved: bool = False,
    rotary_dim: int = 0,
    num_heads: int = 0,
    kv_num_heads: int = 0,
) -> tuple[Tensor, Tensor]:
    _check_types(x, [cos_cache, sin_cache, scale_cache], position_ids, key)
    sizes = spec.check_inputs(
        [*map(spec.shape_of, (x, cos_cache, sin_cache, position_ids, key, scale_cache))],
        rotary_embedding_dim=rotary_dim,
        num_heads=num_heads,
        kv_num_heads=kv_num_heads,
    )
    given = (x, cos_cache, sin_cache, position_ids, key, scale_cache)
    if cpu_kernel.can_rotate(given):
        return cpu_kernel.rotate(given, (interleaved, rotary_dim, num_heads, kv_num_heads))
    if position_ids is not None:
        if sizes.batch_size == 0:  # no rows, so no positions
            position_ids = position_ids.new_zeros((0, sizes.seq_len))
        _check_position_ids(position_ids, sizes.seq_len, sizes.table_rows)
    y, key_out = rotary_embedding_aten(
        x,
        cos_cache,
        sin_cache,
        position_ids,
        key,
        scale_cache,
        interleaved=interleaved,
        num_heads=num_heads,
        kv_num_heads=kv_num_heads,
    )
    return y.contiguous(), key_out.contiguous()  # as the fake implementation


@_rotary_embedding_op.register_fake
def _(
    x: Tensor,
    cos_cache: Tensor,
    sin_cache: Tensor,
    position_ids: Tensor | None = None,
    key: Tensor | None = None,
    scale_cache: Tensor | None = None,
    **attributes: Any,
) -> tuple[Tensor, Tensor]:
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if key is None:
        return y, x.new_empty(0)
    return y, torch.empty(key.shape, dtype=key.dtype, device=key.device)


def _save_for_backward(
    ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: Any
) -> None:
    _, cos_cache, sin_cache, position_ids, key, scale_cache = inputs
    for name, table in zip(spec.INPUTS, inputs, strict=True):
        if name.endswith("_cache") and table is not None and table.requires_grad:
            raise RotaryExportError(
                f"{name} requires a gradient; the op has gradients for X and key only"
            )
    ctx.save_for_backward(cos_cache, sin_cache, position_ids, scale_cache)
    ctx.has_key = key is not None
    ctx.attributes = keyword_only_inputs


def _backward(ctx: Any, grad_y: Tensor, grad_key_out: Tensor) -> tuple[Any, ...]:
    # The transpose of a rotation is the rotation by the opposite angle, with the same scale.
    cos_cache, sin_cache, position_ids, scale_cache = ctx.saved_tensors
    grad_x, grad_key = torch.ops.rotary_export.rotary_embedding(
        grad_y,
        cos_cache,
        -sin_cache,
        position_ids,
        grad_key_out if ctx.has_key else None,
        scale_cache,
        **ctx.attributes,
    )
    return grad_x, None, None, None, grad_key if ctx.has_key else None, None


@_rotary_embedding_op.register_vmap
def _(info: Any, in_dims: tuple[Any, ...], *args: Any, **options: Any) -> tuple[Any, Any]:
    """Rotate one element of the mapped axis after the other, as `torch.vmap` does, but silently."""
    results = [
        _rotary_embedding_op(
            *(
                value if axis is None or value is None else value.select(axis, index)
                for value, axis in zip(args, in_dims, strict=False)
            ),
            **options,
        )
        for index in range(info.batch_size)
    ]
    return tuple(torch.stack(parts) for parts in zip(*results, strict=True)), (0, 0)


_rotary_embedding_op.register_autograd(_backward, setup_context=_save_for_backward)


def rotary_embedding(
    x: Tensor,
    cos_cache: Tensor,
    sin_cache: Tensor,
    position_ids: Tensor | None = None,
    key: Tensor | None = None,
    scale_cache: Tensor | None = None,
    *,
    interleaved: bool = False,
    rotary_dim: int = 0,
    num_heads: int = 0,
    kv_num_heads: int = 0,
) -> tuple[Tensor, Tensor]:
    """Rotate x, and key in the same call, from tables of cosines and sines.

    Args:
        x: (B, N, S, H), or (B, S, N*H) with `num_heads`; float32, float16, bfloat16 or float64.
        cos_cache: (M, R/2) with `position_ids`, else (B, S, R/2) or (1, S, R/2); x's dtype or
            float32.
        sin_cache: As `cos_cache`.
        position_ids: (B, S), (1, S), or (1,) = position of row 0; int64, any order.
        key: As x, with its own number of heads.
        scale_cache: As `cos_cache`; xPos: x times scale, key times 1 / scale.
        interleaved: True: pairs (2i, 2i + 1); False: pairs (i, i + R/2).
        rotary_dim: R; 0 means all of H. Channels past R are copied.
        num_heads: N of a 3-D x.
        kv_num_heads: Heads of a 3-D key.

    Returns:
        x and key, rotated. Without a key, the second tensor is empty, of shape (0,).
        Half types are computed in float32 and rounded once.

    Raises:
        RotaryExportError: Shapes, dtypes or attributes don't fit, or an id is outside [0, M).
    """
    run: Any = torch.ops.rotary_export.rotary_embedding
    if torch.jit.is_tracing():
        run = rotary_embedding_aten
    y, key_out = run(
        x,
        cos_cache,
        sin_cache,
        position_ids,
        key,
        scale_cache,
        interleaved=interleaved,
        rotary_dim=rotary_dim,
        num_heads=num_heads,
        kv_num_heads=kv_num_heads,
    )
    return y, key_out
