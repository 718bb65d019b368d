"""The buffers of a key/value cache that grows: two sets, which take turns."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rotary_export.bundle.dims import name_output
from rotary_export.bundle.manifest import TensorInfo
from rotary_export.compat.ort_binding import Binder
from rotary_export.runtime.tensors import make_dtype
from rotary_export.types import Array

ONNX_BFLOAT16 = 16


def name_element(dtype: np.dtype[Any]) -> Any:
    """Return an element type as IO binding requires it."""
    return ONNX_BFLOAT16 if dtype.name == "bfloat16" else dtype


@dataclass
class _Group:
    """Keys or values of one shape: two arrays, whose rows are a tensor each.

    Attributes:
        heads: N.
        head_dim: H.
        dtype: Of the elements.
        names: Of each tensor's input and output.
        sets: (tensors, elements) arrays.
        addresses: Of the rows of each set.
    """

    heads: int
    head_dim: int
    dtype: np.dtype[Any]
    names: list[tuple[str, str]]
    sets: list[Array]
    addresses: list[list[int]]

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
        groups: dict[tuple[int, int, str], _Group] = {}
        for info in infos:
            _, heads, _, head_dim = info.shape
            assert isinstance(heads, int)
            assert isinstance(head_dim, int)
            dtype = make_dtype(info.dtype)
            empty = np.empty((0, 0), dtype)
            new = _Group(heads, head_dim, dtype, [], [empty, empty], [[], []])
            group = groups.setdefault((heads, head_dim, info.dtype), new)
            group.names.append((info.name, name_output(info.name)))
        self._groups = [*groups.values()]
        self._current = 0  # the set that holds the past
        self._capacity = 0

    def reserve(self, length: int) -> None:
        """Make the next buffers large enough for so many positions."""
        self._capacity = length

    def bind(self, binder: Binder, batch_size: int, past: int, total: int) -> None:
        """Bind what a run reads, `past` positions, and what it writes, `total` positions."""
        read, write = self._current, 1 - self._current
        device, bind_input, bind_output = binder.device, binder.bind_input, binder.bind_output
        for group in self._groups:
            heads, head_dim, element = group.heads, group.head_dim, name_element(group.dtype)
            if not group.addresses[read]:
                group.allocate(read, 1)  # of no position, but with an address
            if group.sets[write].shape[1] < batch_size * heads * total * head_dim:
                length = max(self._capacity, total if not past else 2 * total)
                group.allocate(write, batch_size * heads * length * head_dim)
            old, new = (batch_size, heads, past, head_dim), (batch_size, heads, total, head_dim)
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
            size = group.heads * past * group.head_dim
            if group.sets[write].shape[1] < len(order) * size:
                group.allocate(write, len(order) * size)
            old, new = group.view(read, batch_size, past), group.view(write, len(order), past)
            np.take(old, order, axis=1, out=new)
        self.advance()
