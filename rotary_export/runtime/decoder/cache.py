"""The buffers of a key/value cache: two sets that take turns, or one that is written in place."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rotary_export.bundle.dims import name_output, read_bounded
from rotary_export.bundle.manifest import TensorInfo
from rotary_export.compat.ort_binding import Binder
from rotary_export.runtime.tensors import ELEMENT_TYPES, make_dtype
from rotary_export.types import Array


@dataclass
class _Group:
    """Keys or values of one shape: two arrays, whose rows are a tensor each.

    Attributes:
        heads: N.
        head_dim: H.
        dtype: Of the elements.
        element: ONNX's number of it.
        window: How many positions it keeps at most; None: all.
        names: Of each tensor's input and output.
        sets: (tensors, elements) arrays.
        addresses: Of the rows of each set.
    """

    heads: int
    head_dim: int
    dtype: np.dtype[Any]
    element: int
    window: int | None
    names: list[tuple[str, str]]
    sets: list[Array]
    addresses: list[list[int]]

    def count_kept(self, length: int) -> int:
        """Return how many of so many positions it keeps."""
        return length if self.window is None else min(length, self.window)

    def allocate(self, index: int, elements: int) -> None:
        """Replace one of the sets; its content is lost."""
        self.sets[index] = array = np.empty((len(self.names), elements), self.dtype)
        start, step = array.ctypes.data, array.strides[0]
        self.addresses[index] = [start + step * row for row in range(len(array))]

    def view(self, index: int, batch_size: int, length: int) -> Array:
        """Return one of the sets as (tensors, B, N, length, H)."""
        shape = (batch_size, self.heads, length, self.head_dim)
        used = self.sets[index][:, : math.prod(shape)]
        return used.reshape(len(self.names), *shape)


class GrowingCache:
    """Keys and values of every position so far.

    A run reads one set of buffers and writes the other, which is one token longer. No memory is
    allocated until a set is too small; then it is replaced, without a copy, as it is written whole.

    Args:
        infos: The inputs of the graph that are keys and values.
    """

    def __init__(self, infos: Sequence[TensorInfo]) -> None:
        groups: dict[tuple[int | str, ...], _Group] = {}
        for info in infos:
            _, heads, length, head_dim = info.shape
            bounded = read_bounded(str(length))
            assert isinstance(heads, int)
            assert isinstance(head_dim, int)
            dtype = make_dtype(info.dtype)
            empty = np.empty((0, 0), dtype)
            window = bounded and bounded[1]
            element, sets = ELEMENT_TYPES[info.dtype], [empty, empty]
            new = _Group(heads, head_dim, dtype, element, window, [], sets, [[], []])
            group = groups.setdefault((heads, head_dim, length, info.dtype), new)
            group.names.append((info.name, name_output(info.name)))
        self._groups = [*groups.values()]
        self._current = 0  # the set that holds the past
        self._capacity = 0

    def begin(self, batch_size: int, length: int) -> None:
        """Begin a batch that will grow to so many positions."""
        del batch_size
        self._capacity = length

    def bind(self, binder: Binder, batch_size: int, past: int, total: int) -> None:
        """Bind what a run reads, `past` positions, and what it writes, `total` positions."""
        read, write = self._current, 1 - self._current
        device, bind_input, bind_output = binder.device, binder.bind_input, binder.bind_output
        for group in self._groups:
            heads, head_dim, element = group.heads, group.head_dim, group.element
            if not group.addresses[read]:
                group.allocate(read, 1)  # of no position, but with an address
            old_len, new_len = group.count_kept(past), group.count_kept(total)
            if group.sets[write].shape[1] < batch_size * heads * new_len * head_dim:
                length = group.count_kept(max(self._capacity, total if not past else 2 * total))
                group.allocate(write, batch_size * heads * length * head_dim)
            old = (batch_size, heads, old_len, head_dim)
            new = (batch_size, heads, new_len, head_dim)
            addresses = zip(group.addresses[read], group.addresses[write], strict=True)
            for (name, output), (source, target) in zip(group.names, addresses, strict=True):
                bind_input(name, *device, element, old, source)
                bind_output(output, *device, element, new, target)

    def advance(self) -> None:
        """Make what a run has written the past of the next one."""
        self._current = 1 - self._current

    def reorder(self, order: Array, batch_size: int, past: int) -> None:
        """Replace row i by row order[i]; there may be more or fewer rows than before."""
        read, write = self._current, 1 - self._current
        for group in self._groups:
            length = group.count_kept(past)
            size = group.heads * length * group.head_dim
            if group.sets[write].shape[1] < len(order) * size:
                group.allocate(write, len(order) * size)
            old, new = group.view(read, batch_size, length), group.view(write, len(order), length)
            np.take(old, order, axis=1, out=new)
        self.advance()


class StaticCache:
    """Keys and values in slots of a fixed number, which a run writes at its positions.

    Args:
        infos: The inputs of the graph that are keys and values.
        in_place: A run may write what it reads: bound once, no slot is copied. Else two sets take
            turns.
    """

    def __init__(self, infos: Sequence[TensorInfo], in_place: bool) -> None:
        self._infos = infos
        self._sets: list[list[Array]] = [[] for _ in range(1 if in_place else 2)]
        self._current = 0  # the set that holds the past
        self._bound: int | None = None  # the set that the next run reads already

    def begin(self, batch_size: int, length: int) -> None:
        """Begin a batch: all slots are zero."""
        del length
        self._resize(batch_size)
        for array in self._sets[self._current]:
            array.fill(0)

    def bind(self, binder: Binder, batch_size: int, past: int, total: int) -> None:
        """Bind what a run reads and what it writes, unless they are bound."""
        del batch_size, past, total
        if self._bound == self._current:
            return
        both = self._sets[self._current], self._sets[self._next]
        for info, source, target in zip(self._infos, *both, strict=True):
            form = ELEMENT_TYPES[info.dtype], source.shape
            binder.bind_input(info.name, *binder.device, *form, source.ctypes.data)
            binder.bind_output(name_output(info.name), *binder.device, *form, target.ctypes.data)
        self._bound = self._current

    def advance(self) -> None:
        """Make what a run has written the past of the next one."""
        self._current = self._next

    def reorder(self, order: Array, batch_size: int, past: int) -> None:
        """Replace row i by row order[i]; there may be more or fewer rows than before."""
        del batch_size, past
        moved = [array[order] for array in self._sets[self._current]]
        self._resize(len(order))
        for array, new in zip(self._sets[self._current], moved, strict=True):
            array[...] = new

    @property
    def _next(self) -> int:
        return (self._current + 1) % len(self._sets)

    def _resize(self, batch_size: int) -> None:
        """Make room for so many rows; where there are others, the content is lost."""
        if self._sets[0] and len(self._sets[0][0]) == batch_size:
            return
        self._sets = [
            [
                np.empty((batch_size, *info.shape[1:]), make_dtype(info.dtype))
                for info in self._infos
            ]
            for _ in self._sets
        ]
        self._bound = None
