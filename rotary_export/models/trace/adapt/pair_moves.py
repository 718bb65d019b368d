"""Operators that move or choose elements, on pairs of real numbers, (..., 2).

Axes keep their numbers, counted from the front; so axes that are counted from the end are counted
anew, and shapes get the axis of the parts.
"""

from __future__ import annotations

from typing import Any

from torch.fx import Node

from rotary_export.compat.programs import bind_arguments, get_name
from rotary_export.models.trace.adapt.graph_edit import ATEN
from rotary_export.models.trace.adapt.pair_editor import PairEditor, is_complex

_AXES = ("dim", "dims", "dim0", "dim1", "start_dim", "end_dim")
_SIZES = ("size", "shape")


def move(edit: PairEditor, node: Node) -> Node:
    """Move elements: axes are counted from the front, shapes get the axis of the parts."""
    values, _ = bind_arguments(node)
    new = get_name(node.target) in ("aten::unsqueeze", "aten::stack")
    rank = count_axes(edit, values) + new
    changes: dict[str, Any] = {}
    for name, value in values.items():
        if name in _AXES and value is not None:
            changes[name] = count_from_front(value, rank)
        elif name in _SIZES:
            changes[name] = [*value, 2]
    return edit.call(node, **changes)


def count_axes(edit: PairEditor, values: dict[str, Any]) -> int:
    """Return the rank of the complex tensor that a call moves."""
    first = next(iter(values.values()))
    first = first[0] if isinstance(first, (list, tuple)) else first
    return (
        len(edit.shape_of(edit.pairs[first])) - 1
        if first in edit.pairs
        else len(edit.shape_of(first))
    )


def count_from_front(axes: Any, rank: int) -> Any:
    """Return axes, or one, as numbers >= 0."""
    if isinstance(axes, int):
        return axes % rank if rank else 0
    return [axis % rank for axis in axes]


def permute(edit: PairEditor, node: Node) -> Node:
    """Permute axes; the parts stay last."""
    values, _ = bind_arguments(node)
    rank = count_axes(edit, values)
    return edit.call(node, dims=[*count_from_front(values["dims"], rank), rank])


def transpose(edit: PairEditor, node: Node) -> Node:
    """Swap the axes of a matrix."""
    pair = edit.pairs[node.args[0]]  # type: ignore[index]
    return edit.emit(ATEN.transpose.int, pair, 0, 1) if len(edit.shape_of(pair)) > 2 else pair


def roll(edit: PairEditor, node: Node) -> Node:
    """Roll along axes; without any, in the order of the elements."""
    values, _ = bind_arguments(node)
    if values["dims"]:
        return move(edit, node)
    pair = edit.pairs[values["self"]]
    axes = range(len(edit.shape_of(pair)) - 1)
    sizes = [edit.get_size(pair, axis) for axis in axes]
    flat = edit.emit(ATEN.reshape.default, pair, [-1, 2])
    rolled = edit.emit(ATEN.roll.default, flat, values["shifts"], [0])
    return edit.emit(ATEN.reshape.default, rolled, [*sizes, 2])


def gather(edit: PairEditor, node: Node) -> Node:
    """Gather both parts by the same index."""
    values, _ = bind_arguments(node)
    rank = count_axes(edit, values)
    index = edit.emit(ATEN.expand.default, edit.lift(values["index"]), [-1] * rank + [2])
    return edit.call(node, dim=count_from_front(values["dim"], rank), index=index)


def embed(edit: PairEditor, node: Node) -> Node:
    """Take the rows of a table."""
    values, _ = bind_arguments(node)
    return edit.emit(ATEN.index.Tensor, edit.pairs[values["weight"]], [values["indices"]])


def reduce(edit: PairEditor, node: Node) -> Node:
    """Sum or average over axes, or over all."""
    values, _ = bind_arguments(node)
    rank = count_axes(edit, values)
    dims = count_from_front(values.get("dim") or range(rank), rank)
    target = ATEN.mean.dim if get_name(node.target) == "aten::mean" else ATEN.sum.dim_IntList
    pair = edit.pairs[values["self"]]
    return edit.emit(target, pair, dims, values.get("keepdim", False)) if dims else pair


def pad(edit: PairEditor, node: Node) -> Node:
    """Pad with a number, or otherwise; axes are counted from the last one."""
    values, _ = bind_arguments(node)
    sizes, mode = values["pad"], values.get("mode", "constant")
    number = complex(values.get("value") or 0)
    if not number:
        return edit.emit(ATEN.pad.default, edit.pairs[values["self"]], [0, 0, *sizes], mode)
    parts = zip(edit.split(values["self"]), (number.real, number.imag), strict=True)
    return edit.join(*(edit.emit(ATEN.pad.default, p, sizes, mode, part) for p, part in parts))


def view_as(edit: PairEditor, node: Node) -> Node:
    """Change shape, or read (..., 2 * n) real numbers as (..., n) complex ones or the reverse."""
    values, _ = bind_arguments(node)
    if "dtype" not in values:
        return move(edit, node)
    if not is_complex(node):
        return edit.emit(ATEN.flatten.using_ints, edit.pairs[values["self"]], -2, -1)
    if values["self"] in edit.pairs:
        return edit.pairs[values["self"]]
    return edit.emit(ATEN.unflatten.int, values["self"], -1, [-1, 2])


def choose(edit: PairEditor, node: Node) -> Node:
    """Choose between two tensors by a mask."""
    condition, first, second = node.args
    pairs = [edit.pair(value) for value in (first, second)]  # type: ignore[arg-type]
    return edit.emit(ATEN.where.self, edit.lift(condition), *pairs)


def mask_fill(edit: PairEditor, node: Node) -> Node:
    """Fill with a number where a mask is true."""
    values, _ = bind_arguments(node)
    number = values["value"]
    parts = zip(edit.split(values["self"]), edit.split(number), strict=True)
    target = ATEN.masked_fill.Tensor if isinstance(number, Node) else ATEN.masked_fill.Scalar
    zero = ATEN.masked_fill.Scalar
    return edit.join(
        *(
            edit.emit(zero if new is None else target, part, values["mask"], new or 0)
            for part, new in parts
        )
    )


def read_size(edit: PairEditor, node: Node) -> Node:
    """Read a size of the real part, which has the shape of the complex tensor."""
    return edit.emit(node.target, edit.split(node.args[0])[0], *node.args[1:])
