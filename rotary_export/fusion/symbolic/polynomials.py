"""Channels as sums of products of atoms: exact arithmetic on names instead of numbers.

A channel is a sum of products of atoms: an atom is a channel of some value further up, or a
function of such sums. Two channels with the same sum hold the same numbers.

    x cos + rotate_half(x) sin, channel 0 of 4:   {(x0, cos0): 1, (x2, sin0): -1}
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from onnxscript import ir

Atom = tuple[Any, ...]
Sum = frozenset[tuple[tuple[Atom, ...], float]]  # products of atoms, each with a coefficient
Channels = np.ndarray[Any, np.dtype[Any]]  # of Sum, in the shape of the trailing axes

MAX_CHANNELS = 2**14
_MAX_CONSTANT = 2**22  # elements of a constant table whose columns are compared


class UnknownShapeError(Exception):
    """The trailing axes of a value are not static."""


def read_dims(value: ir.Value) -> list[int | str | None] | None:
    """Return a value's shape: sizes, names of symbolic sizes, None for unknown ones."""
    if value.shape is None:
        return None
    return [dim if isinstance(dim, int) else dim.value for dim in value.shape]


def read_constant(value: ir.Value | None) -> np.ndarray[Any, Any] | None:
    """Return the array of a value that no run can change."""
    if value is None or value.is_graph_input():
        return None
    tensor = value.const_value
    if tensor is None:
        node = value.producer()
        if node is None or node.op_type != "Constant" or node.domain:
            return None
        tensor = ir.convenience.get_const_tensor(value)
    return None if tensor is None or tensor.size > _MAX_CONSTANT else tensor.numpy()


def read_ints(value: ir.Value | None) -> list[int] | None:
    """Return a constant of integers as a flat list."""
    array = read_constant(value)
    return None if array is None else [int(i) for i in array.reshape(-1)]


def number(value: float) -> Sum:
    """Return a channel that is one number."""
    return frozenset({((), float(value))}) if value else frozenset()


def atom(*parts: Any) -> Sum:
    """Return a channel that is one atom."""
    return frozenset({((parts,), 1.0)})


def add(a: Sum, b: Sum, sign: float = 1.0) -> Sum:
    """Return a + sign * b."""
    terms = dict(a)
    for product, factor in b:
        terms[product] = terms.get(product, 0.0) + sign * factor
    return frozenset((product, factor) for product, factor in terms.items() if factor)


def multiply(a: Sum, b: Sum) -> Sum:
    """Return a * b."""
    terms: dict[tuple[Atom, ...], float] = {}
    for left, x in a:
        for right, y in b:
            product = tuple(sorted(left + right, key=hash))
            terms[product] = terms.get(product, 0.0) + x * y
    return frozenset((product, factor) for product, factor in terms.items() if factor)


def scale(a: Sum, factor: float) -> Sum:
    """Return factor * a."""
    return frozenset((product, factor * x) for product, x in a)


def has_atom(channel: Sum, tag: str) -> bool:
    """Whether a channel is computed from an atom of this tag, at its top level."""
    return any(atom[0] == tag for product, _ in channel for atom in product)


def trailing_shape(value: ir.Value, rank: int) -> tuple[int, ...]:
    """Return the sizes of a value's last `rank` axes.

    Raises:
        UnknownShapeError: One is not static, there are not so many, or too many channels.
    """
    dims = read_dims(value)
    if dims is None or len(dims) < rank:
        raise UnknownShapeError(value.name)
    shape = tuple(d for d in dims[len(dims) - rank :] if isinstance(d, int))
    if len(shape) != rank or math.prod(shape) > MAX_CHANNELS:
        raise UnknownShapeError(value.name)
    return shape


def atoms(tag: str, shape: tuple[int, ...], *source: Any) -> Channels:
    """Return channels that are atoms of their own."""
    channels = np.empty(shape, object)
    flat = channels.reshape(-1)
    for i in range(flat.size):
        flat[i] = atom(tag, *source, i)
    return channels


def fill(shape: tuple[int, ...], make: Callable[[tuple[int, ...]], Sum]) -> Channels:
    """Make channels one by one, by their index."""
    channels = np.empty(shape, object)
    for index in np.ndindex(shape):
        channels[index] = make(index)
    return channels


def trace_constant(
    value: ir.Value, constant: np.ndarray[Any, Any], rank: int, shape: tuple[int, ...]
) -> Channels:
    """Numbers where a channel is one number; else equal columns get the same atom."""
    columns = constant.reshape(-1, math.prod(shape)) if constant.size else constant.reshape(0, 0)
    if not constant.size:
        return atoms("v", shape, value)
    if len(columns) == 1:
        return fill(
            shape,
            lambda index: number(columns[0, np.ravel_multi_index(index, shape) if shape else 0]),
        )
    first: dict[bytes, int] = {}
    flat = [first.setdefault(columns[:, i].tobytes(), i) for i in range(columns.shape[1])]
    return fill(
        shape,
        lambda index: atom(
            "v", value, flat[int(np.ravel_multi_index(index, shape)) if shape else 0]
        ),
    )


def wrap(tag: str, head: Any, channels: Channels) -> Channels:
    """Return what an operator makes of each channel alike."""
    return fill(channels.shape, lambda index: atom(tag, head, channels[index]))
