"""Handlers of operators that move channels, or move rows and leave the channels as they are."""

from __future__ import annotations

import math

import numpy as np
from onnxscript import ir

from rotary_export.fusion.symbolic.handler import Shape, Tracer, make_head, read_rank, trace_operand
from rotary_export.fusion.symbolic.polynomials import (
    Channels,
    fill,
    scale,
    symbol,
    trailing_shape,
    wrap_leading,
)
from rotary_export.fusion.values import (
    Dims,
    read_constant,
    read_dims,
    read_int_attribute,
    read_ints,
)

_SIGN = np.frompyfunc(scale, 2, 1)


def _trace_leading(
    tracer: Tracer, node: ir.Node, data: ir.Value, rank: int, shape: Shape
) -> Channels | None:
    """An operator that treats every channel alike: it works on the leading axes alone."""
    channels = tracer.trace(data, rank)
    if channels.shape != shape:
        return None
    others = []
    for other in node.inputs:
        ints = read_ints(other) if other is not data and other is not None else None
        if other is not data:
            others.append(tuple(ints) if ints is not None else other)
    return wrap_leading((*make_head(node), *others), channels)


def _read_data(node: ir.Node) -> tuple[ir.Value, int]:
    """Return the first input and its rank."""
    data = node.inputs[0]
    assert data is not None
    return data, read_rank(data)


def _read_axis(node: ir.Node, rank: int) -> int:
    axis = read_int_attribute(node, "axis")
    return axis + rank if axis < 0 else axis


def trace_slice(
    tracer: Tracer, node: ir.Node, value: ir.Value, rank: int, shape: Shape
) -> Channels | None:
    """Slice; along the leading axes, every channel is cut alike."""
    data, total = _read_data(node)
    given = [read_ints(v) if v is not None else None for v in node.inputs[1:]]
    given += [None] * (4 - len(given))
    starts, ends, axes, steps = given
    has_axes = len(node.inputs) > 3 and node.inputs[3] is not None
    if has_axes and axes is None:
        return None
    count = len(axes) if axes is not None else len(starts or ends or range(total))
    axes = [a % total for a in (axes if axes is not None else range(count))]
    if all(axis < total - rank for axis in axes):
        return _trace_leading(tracer, node, data, rank, shape)
    if starts is None or ends is None or any(axis < total - rank for axis in axes):
        return None
    if len(node.inputs) > 4 and node.inputs[4] is not None and steps is None:
        return None
    channels = tracer.trace(data, rank)
    cut = [slice(None)] * rank
    for axis, start, end, step in zip(axes, starts, ends, steps or [1] * count, strict=True):
        if step < 1:
            return None
        cut[axis - (total - rank)] = slice(start, end, step)
    return channels[tuple(cut)]


def trace_split(
    tracer: Tracer, node: ir.Node, value: ir.Value, rank: int, shape: Shape
) -> Channels | None:
    """Split; an output contains a range of channels, or of rows."""
    data, total = _read_data(node)
    axis = _read_axis(node, total)
    if axis < total - rank:
        found = _trace_leading(tracer, node, data, rank, shape)
        index = value.index()
        return None if found is None else wrap_leading(("output", index), found)
    own = axis - (total - rank)
    sizes = [trailing_shape(v, rank)[own] for v in node.outputs]
    start = sum(sizes[: value.index() or 0])
    cut = [slice(None)] * rank
    cut[own] = slice(start, start + shape[own])
    return tracer.trace(data, rank)[tuple(cut)]


def trace_concat(
    tracer: Tracer, node: ir.Node, value: ir.Value, rank: int, shape: Shape
) -> Channels:
    """Concat; of channels, or of rows, where each channel is a function of the parts'."""
    total = read_rank(value)
    axis = _read_axis(node, total)
    parts = [tracer.trace(v, rank) for v in node.inputs if v is not None]
    if axis >= total - rank:
        return np.concatenate(parts, axis=axis - (total - rank))
    head = make_head(node)
    return fill(shape, lambda index: symbol("function", head, *(part[index] for part in parts)))


def trace_gather(
    tracer: Tracer, node: ir.Node, value: ir.Value, rank: int, shape: Shape
) -> Channels | None:
    """Gather; of channels by constant indices, or of rows by any."""
    data, indices = node.inputs
    assert data is not None
    assert indices is not None
    total = read_rank(data)
    axis = _read_axis(node, total)
    behind = total - axis - 1  # axes of data after the one that is gathered
    if rank <= behind:
        return _trace_leading(tracer, node, data, rank, shape)
    constant = read_constant(indices)
    own = rank - constant.ndim + 1 if constant is not None else 0
    if constant is None or own <= behind or own > total:
        return None
    return np.take(tracer.trace(data, own), constant.astype(int), axis=own - 1 - behind)


def trace_reshape(
    tracer: Tracer, node: ir.Node, value: ir.Value, rank: int, shape: Shape
) -> Channels | None:
    """Reshape, Squeeze, Unsqueeze, Flatten: the order of elements stays."""
    data = node.inputs[0]
    assert data is not None
    dims, out = read_dims(data), read_dims(value)
    assert dims is not None
    assert out is not None
    size, wanted = 1, math.prod(shape)
    for own in range(len(dims) + 1):
        if own:
            dim = dims[len(dims) - own]
            if not isinstance(dim, int):
                return None
            size *= dim
        if size == wanted and _has_same_leading_axes(node, dims, own, out, rank):
            return tracer.trace(data, own).reshape(shape)
        if size == wanted and own >= rank and size > 1:
            channels = tracer.trace(data, own).reshape(shape)
            leading = (*(str(d) for d in out[: len(out) - rank]), len(dims) - own)
            return wrap_leading((node.op_type, leading), channels)
        if size > wanted:
            return None
    return None


def _has_same_leading_axes(node: ir.Node, dims: Dims, own: int, out: Dims, rank: int) -> bool:
    """Return whether the axes before the channels are the same ones on both sides."""
    before, after = dims[: len(dims) - own], out[: len(out) - rank]
    if len(before) != len(after):
        return False
    copied = [False] * len(after)
    if node.op_type == "Reshape" and not read_int_attribute(node, "allowzero"):
        shape = read_ints(node.inputs[1])
        copied = [s == 0 for s in (shape or [])[: len(after)]] + copied
    open_ones = [
        i
        for i, (a, b) in enumerate(zip(before, after, strict=True))
        if not copied[i] and (a is None or a != b)
    ]
    # Where all but one axis agree, so does the last one: the number of elements is the same.
    return len(open_ones) <= 1


def trace_transpose(
    tracer: Tracer, node: ir.Node, value: ir.Value, rank: int, shape: Shape
) -> Channels | None:
    """Transpose; channels stay channels, in whatever order."""
    data, total = _read_data(node)
    attribute = node.attributes.get("perm")
    perm = list(range(total))[::-1] if attribute is None else list(attribute.as_ints())
    leading = total - rank
    if sorted(perm[leading:]) != list(range(leading, total)):
        return None
    channels = tracer.trace(data, rank).transpose([axis - leading for axis in perm[leading:]])
    if perm[:leading] == list(range(leading)):
        return channels
    return wrap_leading(("Transpose", tuple(perm[:leading])), channels)


def trace_expand(
    tracer: Tracer, node: ir.Node, value: ir.Value, rank: int, shape: Shape
) -> Channels | None:
    """Expand; the channels are repeated, or the rows are."""
    data = node.inputs[0]
    channels = np.broadcast_to(trace_operand(tracer, data, rank), shape)
    before = read_dims(data) if data is not None else None
    after = read_dims(value)
    assert before is not None
    assert after is not None
    leading = len(after) - rank
    if None not in after[:leading] and before[: max(0, len(before) - rank)] == after[:leading]:
        return channels
    # Broadcasting along the leading axes: the same numbers in every row.
    return wrap_leading(("Expand",), channels)


def trace_tile(
    tracer: Tracer, node: ir.Node, value: ir.Value, rank: int, shape: Shape
) -> Channels | None:
    """Tile; the channels are repeated."""
    data, repeats = node.inputs[0], read_ints(node.inputs[1])
    if data is None or repeats is None:
        return None
    leading = len(repeats) - rank
    if leading < 0 or any(r != 1 for r in repeats[:leading]):
        return None
    return np.tile(tracer.trace(data, rank), repeats[leading:])


def trace_matmul(
    tracer: Tracer, node: ir.Node, value: ir.Value, rank: int, shape: Shape
) -> Channels | None:
    """MatMul by a constant matrix that moves channels, with signs: one 1 or -1 in each column."""
    data, matrix = node.inputs
    constant = read_constant(matrix)
    if data is None or constant is None or constant.ndim != 2 or rank < 1 or read_rank(data) < 2:
        return None
    entries = constant.astype(np.float64)
    is_signed = np.isin(entries, (-1.0, 0.0, 1.0)).all()
    if not is_signed or (np.count_nonzero(entries, axis=0) != 1).any():
        return None
    sources = np.abs(entries).argmax(axis=0)
    channels = tracer.trace(data, rank)[..., sources]
    signs = entries[sources, np.arange(len(sources))]
    return np.asarray(_SIGN(channels, signs), object).reshape(shape)
