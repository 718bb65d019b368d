"""Infer what ONNX's shape inference leaves open, where a computed shape is half known.

torch's old exporter, and with it optimum, computes every shape in the graph. Tile by
(batch_size, 1, 1) keeps the last two sizes; Reshape of (B, S, 8, 2) to (*Shape(x)[:3], -1) makes
16.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from onnxscript import ir

from rotary_export.fusion.values import (
    Dims,
    read_constant,
    read_dims,
    read_int_attribute,
    read_ints,
)

_MAX_SIZES = 16  # no shape has more axes
_KEPT = {"Unsqueeze", "Squeeze", "Reshape", "Cast", "Identity"}  # the same sizes, in order


def fill_shapes(model: ir.Model) -> bool:
    """Set the sizes that follow from half-known shapes, in place.

    Args:
        model: Sorted, with inferred shapes.

    Returns:
        Whether any were set.
    """
    changed = False
    for node in model.graph.all_nodes():
        infer = _HANDLERS.get(node.op_type)
        if infer is None or node.domain or node.inputs[0] is None:
            continue
        found, value = infer(node), node.outputs[0]
        dims = read_dims(value) or ([None] * len(found) if found is not None else None)
        if found is None or dims is None or len(found) != len(dims):
            continue
        merged = [
            new if isinstance(new, int) or _is_unknown(old) else old
            for new, old in zip(found, dims, strict=True)
        ]
        if merged != dims:
            value.shape = ir.Shape(merged)
            changed = True
    return changed


def clear_generated_dims(model: ir.Model) -> None:
    """Drop the names that shape inference generated, so that it finds better ones, in place."""
    for node in model.graph.all_nodes():
        for value in node.outputs:
            dims = read_dims(value)
            if dims is not None and any(map(_is_unknown, dims)):
                value.shape = ir.Shape([None if _is_unknown(dim) else dim for dim in dims])


def _is_unknown(dim: int | str | None) -> bool:
    """Return whether a size has no name, or one that shape inference generated."""
    return dim is None or (isinstance(dim, str) and dim.startswith("unk__"))


def read_sizes(value: ir.Value | None) -> Dims | None:
    """Return a vector of sizes as far as they are known; a scalar is a vector of one."""
    constant = read_constant(value)
    if constant is not None:
        is_short = constant.size <= _MAX_SIZES and constant.dtype.kind in "biu"
        return [int(size) for size in constant.reshape(-1)] if is_short else None
    node = None if value is None else value.producer()
    if node is None or node.domain:
        return None
    if node.op_type in _KEPT:
        return read_sizes(node.inputs[0])
    reader = _READERS.get(node.op_type)
    return reader(node) if reader else None


def _read_shape(node: ir.Node) -> Dims | None:
    dims = read_dims(node.inputs[0]) if node.inputs[0] is not None else None
    return dims if not node.attributes else None


def _read_gather(node: ir.Node) -> Dims | None:
    sizes, picked = read_sizes(node.inputs[0]), read_ints(node.inputs[1])
    if sizes is None or picked is None:
        return None
    return [sizes[i] if -len(sizes) <= i < len(sizes) else None for i in picked]


def _read_concat(node: ir.Node) -> Dims | None:
    parts = [read_sizes(v) for v in node.inputs]
    found: Dims = []
    for part in parts:
        if part is None:
            return None
        found += part
    return found


def _elementwise(combine: Callable[..., Any]) -> Callable[[ir.Node], Dims | None]:
    def read(node: ir.Node) -> Dims | None:
        parts = [read_sizes(v) for v in node.inputs]
        length = max((len(part) for part in parts if part is not None), default=0)
        if any(part is None or len(part) not in (1, length) for part in parts):
            return None
        columns = [part * (length // len(part)) for part in parts if part]
        return [combine(*column) for column in zip(*columns, strict=True)]

    return read


def _is_equal(a: int | str | None, b: int | str | None) -> int | None:
    if isinstance(a, int) and isinstance(b, int):
        return int(a == b)
    is_negative = any(isinstance(size, int) and size < 0 for size in (a, b))
    return 0 if is_negative and None not in (a, b) else None  # no size is -1


def _choose(flag: int | str | None, a: int | str | None, b: int | str | None) -> int | str | None:
    return (a if flag else b) if isinstance(flag, int) else None


_READERS: dict[str, Callable[[ir.Node], Dims | None]] = {
    "Shape": _read_shape,
    "Gather": _read_gather,
    "Concat": _read_concat,
    "Equal": _elementwise(_is_equal),
    "Where": _elementwise(_choose),
}


def _infer_reshape(node: ir.Node) -> Dims | None:
    """(B, S, 8, 2) to (B, S, ?) makes 16."""
    assert node.inputs[0] is not None
    before, after = read_dims(node.inputs[0]), read_dims(node.outputs[0])
    wanted = read_sizes(node.inputs[1])
    allowzero = read_int_attribute(node, "allowzero")
    if wanted is not None and before is not None and not allowzero:
        named = [
            before[i] if size == 0 and i < len(before) else size for i, size in enumerate(wanted)
        ]
        own: Dims = [None if size == -1 else size for size in named]
        after = own if after is None or len(after) != len(own) else [
            a if isinstance(a, int) or b is None else b for a, b in zip(after, own, strict=True)
        ]  # fmt: skip
    if before is None or after is None or None in before:
        return after
    names = [d for d in before if not isinstance(d, int)]
    unknown = []
    for axis, dim in enumerate(after):
        if isinstance(dim, int):
            continue
        if dim is not None and dim in names:
            names.remove(dim)
        else:
            unknown.append(axis)
    known = math.prod(d for d in after if isinstance(d, int))
    if not names and len(unknown) == 1 and known:
        after[unknown[0]] = math.prod(d for d in before if isinstance(d, int)) // known
    return after


def _infer_expand(node: ir.Node) -> Dims | None:
    assert node.inputs[0] is not None
    dims, wanted = read_dims(node.inputs[0]), read_sizes(node.inputs[1])
    if dims is None or wanted is None:
        return None
    rank = max(len(dims), len(wanted))
    own: Dims = [*[1] * (rank - len(dims)), *dims]
    other: Dims = [*[1] * (rank - len(wanted)), *wanted]
    return [_broadcast(a, b) for a, b in zip(own, other, strict=True)]


def _broadcast(a: int | str | None, b: int | str | None) -> int | str | None:
    if a == 1 or b == 1:
        return b if a == 1 else a
    return a if isinstance(a, int) else b


def _infer_tile(node: ir.Node) -> Dims | None:
    assert node.inputs[0] is not None
    dims, repeats = read_dims(node.inputs[0]), read_sizes(node.inputs[1])
    if dims is None or repeats is None or len(dims) != len(repeats):
        return None
    return [
        d if r == 1 else d * r if isinstance(d, int) and isinstance(r, int) else None
        for d, r in zip(dims, repeats, strict=True)
    ]


def _infer_slice(node: ir.Node) -> Dims | None:
    """The axes that are not cut keep their sizes, whatever becomes of the others."""
    assert node.inputs[0] is not None
    dims = read_dims(node.inputs[0])
    axes = read_ints(node.inputs[3]) if len(node.inputs) > 3 else None
    after = read_dims(node.outputs[0])
    if dims is None or axes is None:
        return None
    cut = {axis % len(dims) for axis in axes}
    after = after or [None] * len(dims)
    return [after[i] if i in cut else dim for i, dim in enumerate(dims)]


_HANDLERS: dict[str, Callable[[ir.Node], Dims | None]] = {
    "Reshape": _infer_reshape,
    "Expand": _infer_expand,
    "Tile": _infer_tile,
    "Slice": _infer_slice,
}
