"""Operators: each handler returns the channels of an output, or None if it does not understand."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
from onnxscript import ir

from rotary_export.fusion.symbolic.polynomials import (
    Channels,
    Sum,
    UnknownShapeError,
    add,
    atom,
    fill,
    has_atom,
    multiply,
    number,
    read_constant,
    read_dims,
    read_ints,
    scale,
    trailing_shape,
    wrap,
)

FLOATS = {ir.DataType.FLOAT, ir.DataType.DOUBLE, ir.DataType.FLOAT16, ir.DataType.BFLOAT16}

# Elementwise; what they compute from equal channels is equal.
_FUNCTIONS = {
    "Cos", "Sin", "Exp", "Log", "Sqrt", "Reciprocal", "Pow", "Div", "Max", "Min", "Where",
    "Floor", "Ceil", "Round", "Abs", "Cast", "Equal", "Greater", "Less", "GreaterOrEqual",
    "LessOrEqual", "And", "Or", "Not", "Mod", "Clip", "IsNaN", "Sigmoid", "Tanh",
}  # fmt: skip


_ADD = np.frompyfunc(add, 2, 1)
_SUB = np.frompyfunc(lambda a, b: add(a, b, -1.0), 2, 1)
_MUL = np.frompyfunc(multiply, 2, 1)
_NEG = np.frompyfunc(lambda a: scale(a, -1.0), 1, 1)


class Tracer(Protocol):
    """What `channels.Tracer` is to a handler."""

    factors: list[tuple[ir.Value, Channels, int]]

    def trace(self, value: ir.Value, rank: int) -> Channels:
        """Return the channels of a value's last `rank` axes."""


Handler = Callable[[Tracer, ir.Node, ir.Value, int, tuple[int, ...]], "Channels | None"]


def _rank(value: ir.Value | None) -> int:
    if value is None or value.shape is None:
        raise UnknownShapeError(value.name if value is not None else "")
    return len(value.shape)


def _operand(tracer: Tracer, value: ir.Value | None, rank: int) -> Channels:
    """Trace an input of an elementwise node, which may have fewer axes than the output."""
    assert value is not None
    own = min(rank, _rank(value))
    channels = tracer.trace(value, own)
    return channels.reshape((1,) * (rank - own) + channels.shape)


def _trace_sum(
    tracer: Tracer, node: ir.Node, value: ir.Value, rank: int, shape: tuple[int, ...]
) -> Channels:
    a, b = (_operand(tracer, v, rank) for v in node.inputs)
    result = (_ADD if node.op_type == "Add" else _SUB)(a, b)
    return np.broadcast_to(np.asarray(result, object), shape)


def _trace_product(
    tracer: Tracer, node: ir.Node, value: ir.Value, rank: int, shape: tuple[int, ...]
) -> Channels:
    a, b = (_operand(tracer, v, rank) for v in node.inputs)
    mine = [any(has_atom(channel, "x") for channel in side.flat) for side in (a, b)]
    if mine[0] != mine[1]:
        factor = node.inputs[int(mine[0])]
        assert factor is not None
        own = min(rank, _rank(factor))
        tracer.factors.append((factor, tracer.trace(factor, own), own))
    return np.broadcast_to(np.asarray(_MUL(a, b), object), shape)


def _trace_neg(
    tracer: Tracer, node: ir.Node, value: ir.Value, rank: int, shape: tuple[int, ...]
) -> Channels:
    return np.asarray(_NEG(_operand(tracer, node.inputs[0], rank)), object).reshape(shape)


def _trace_identity(
    tracer: Tracer, node: ir.Node, value: ir.Value, rank: int, shape: tuple[int, ...]
) -> Channels:
    return _operand(tracer, node.inputs[0], rank)


def _signature(node: ir.Node) -> tuple[Any, ...]:
    """What, besides the data, the output of a node depends on."""
    attributes = tuple(sorted((name, str(a.value)) for name, a in node.attributes.items()))
    return (node.op_type, attributes)


def _trace_function(
    tracer: Tracer, node: ir.Node, value: ir.Value, rank: int, shape: tuple[int, ...]
) -> Channels | None:
    """Any elementwise function: equal arguments, equal results."""
    if node.op_type == "Cast" and {v.dtype for v in (node.inputs[0], value) if v} <= FLOATS:
        return _operand(tracer, node.inputs[0], rank)  # a rounding; verified numerically
    if node.op_type == "Div":
        divisor = _operand(tracer, node.inputs[1], rank)
        divisors = [_read_number(channel) for channel in divisor.flat]
        if all(divisors):
            inverse = np.empty(divisor.size, object)
            for i, x in enumerate(divisors):
                inverse[i] = number(1.0 / x) if x else frozenset()
            a = _operand(tracer, node.inputs[0], rank)
            result = _MUL(a, inverse.reshape(divisor.shape))
            return np.broadcast_to(np.asarray(result, object), shape)
    operands = [
        np.broadcast_to(_operand(tracer, v, rank), shape) if v is not None else None
        for v in node.inputs
    ]
    head = _signature(node)
    return fill(
        shape, lambda index: atom("f", head, *(o if o is None else o[index] for o in operands))
    )


def _read_number(channel: Sum) -> float | None:
    if len(channel) != 1:
        return None
    ((product, factor),) = channel
    return None if product else factor


def _lead(
    tracer: Tracer, node: ir.Node, data: ir.Value, rank: int, shape: tuple[int, ...]
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
    return wrap("l", (*_signature(node), *others), channels)


def _axis(node: ir.Node, rank: int, default: int = 0) -> int:
    attribute = node.attributes.get("axis")
    axis = default if attribute is None else attribute.as_int()
    return axis + rank if axis < 0 else axis


def _trace_slice(
    tracer: Tracer, node: ir.Node, value: ir.Value, rank: int, shape: tuple[int, ...]
) -> Channels | None:
    data = node.inputs[0]
    assert data is not None
    total = _rank(data)
    given = [read_ints(v) if v is not None else None for v in node.inputs[1:]]
    given += [None] * (4 - len(given))
    starts, ends, axes, steps = given
    has_axes = len(node.inputs) > 3 and node.inputs[3] is not None
    if has_axes and axes is None:
        return None
    count = len(axes) if axes is not None else len(starts or ends or range(total))
    axes = [a % total for a in (axes if axes is not None else range(count))]
    if all(axis < total - rank for axis in axes):
        return _lead(tracer, node, data, rank, shape)
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


def _trace_split(
    tracer: Tracer, node: ir.Node, value: ir.Value, rank: int, shape: tuple[int, ...]
) -> Channels | None:
    data = node.inputs[0]
    assert data is not None
    total = _rank(data)
    axis = _axis(node, total)
    if axis < total - rank:
        found = _lead(tracer, node, data, rank, shape)
        index = value.index()
        return None if found is None else wrap("o", index, found)
    own = axis - (total - rank)
    sizes = [trailing_shape(v, rank)[own] for v in node.outputs]
    start = sum(sizes[: value.index() or 0])
    cut = [slice(None)] * rank
    cut[own] = slice(start, start + shape[own])
    return tracer.trace(data, rank)[tuple(cut)]


def _trace_concat(
    tracer: Tracer, node: ir.Node, value: ir.Value, rank: int, shape: tuple[int, ...]
) -> Channels:
    total = _rank(value)
    axis = _axis(node, total)
    parts = [tracer.trace(v, rank) for v in node.inputs if v is not None]
    if axis >= total - rank:
        return np.concatenate(parts, axis=axis - (total - rank))
    head = _signature(node)
    return fill(shape, lambda index: atom("f", head, *(part[index] for part in parts)))


def _trace_gather(
    tracer: Tracer, node: ir.Node, value: ir.Value, rank: int, shape: tuple[int, ...]
) -> Channels | None:
    data, indices = node.inputs
    assert data is not None
    assert indices is not None
    total = _rank(data)
    axis = _axis(node, total)
    behind = total - axis - 1  # axes of data after the one that is gathered
    if rank <= behind:
        return _lead(tracer, node, data, rank, shape)
    constant = read_constant(indices)
    own = rank - constant.ndim + 1 if constant is not None else 0
    if constant is None or own <= behind or own > total:
        return None
    return np.take(tracer.trace(data, own), constant.astype(int), axis=own - 1 - behind)


def _trace_reshape(
    tracer: Tracer, node: ir.Node, value: ir.Value, rank: int, shape: tuple[int, ...]
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
        if size == wanted and _same_lead(node, dims, own, out, rank):
            return tracer.trace(data, own).reshape(shape)
        if size == wanted and own >= rank and size > 1:
            channels = tracer.trace(data, own).reshape(shape)
            lead = (*(str(d) for d in out[: len(out) - rank]), len(dims) - own)
            return wrap("l", (node.op_type, lead), channels)
        if size > wanted:
            return None
    return None


def _same_lead(
    node: ir.Node,
    dims: list[int | str | None],
    own: int,
    out: list[int | str | None],
    rank: int,
) -> bool:
    """Whether the axes before the channels are the same ones on both sides."""
    before, after = dims[: len(dims) - own], out[: len(out) - rank]
    if len(before) != len(after):
        return False
    copied = [False] * len(after)
    if node.op_type == "Reshape" and not (
        "allowzero" in node.attributes and node.attributes["allowzero"].as_int()
    ):
        shape = read_ints(node.inputs[1])
        copied = [s == 0 for s in (shape or [])[: len(after)]] + copied
    open_ones = [
        i
        for i, (a, b) in enumerate(zip(before, after, strict=True))
        if not copied[i] and (a is None or a != b)
    ]
    # Where all but one axis agree, so does the last one: the number of elements is the same.
    return len(open_ones) <= 1


def _trace_transpose(
    tracer: Tracer, node: ir.Node, value: ir.Value, rank: int, shape: tuple[int, ...]
) -> Channels | None:
    data = node.inputs[0]
    assert data is not None
    total = _rank(data)
    attribute = node.attributes.get("perm")
    perm = list(range(total))[::-1] if attribute is None else list(attribute.as_ints())
    lead = total - rank
    if sorted(perm[lead:]) != list(range(lead, total)):
        return None
    channels = tracer.trace(data, rank).transpose([axis - lead for axis in perm[lead:]])
    if perm[:lead] == list(range(lead)):
        return channels
    return wrap("l", ("Transpose", tuple(perm[:lead])), channels)


def _trace_expand(
    tracer: Tracer, node: ir.Node, value: ir.Value, rank: int, shape: tuple[int, ...]
) -> Channels | None:
    data = node.inputs[0]
    channels = np.broadcast_to(_operand(tracer, data, rank), shape)
    before = read_dims(data) if data is not None else None
    after = read_dims(value)
    assert before is not None
    assert after is not None
    lead = len(after) - rank
    if None not in after[:lead] and before[: max(0, len(before) - rank)] == after[:lead]:
        return channels
    # Broadcasting along the leading axes: the same numbers in every row.
    return wrap("e", "Expand", channels)


def _trace_tile(
    tracer: Tracer, node: ir.Node, value: ir.Value, rank: int, shape: tuple[int, ...]
) -> Channels | None:
    data, repeats = node.inputs[0], read_ints(node.inputs[1])
    if data is None or repeats is None:
        return None
    lead = len(repeats) - rank
    if lead < 0 or any(r != 1 for r in repeats[:lead]):
        return None
    return np.tile(tracer.trace(data, rank), repeats[lead:])


HANDLERS: dict[str, Handler] = {
    "Add": _trace_sum,
    "Sub": _trace_sum,
    "Mul": _trace_product,
    "Neg": _trace_neg,
    "Identity": _trace_identity,
    "Slice": _trace_slice,
    "Split": _trace_split,
    "Concat": _trace_concat,
    "Gather": _trace_gather,
    "Reshape": _trace_reshape,
    "Squeeze": _trace_reshape,
    "Unsqueeze": _trace_reshape,
    "Flatten": _trace_reshape,
    "Transpose": _trace_transpose,
    "Expand": _trace_expand,
    "Tile": _trace_tile,
    **dict.fromkeys(_FUNCTIONS, _trace_function),
}
