"""Find out what a function computes: probe, don't parse.

A hypothesis (which tensors, which dimensions, which channels, which layout) is taken only if the
op, with the tables that the function itself returns for it, gives what the function gives on random
inputs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice, permutations
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from rotary_export.errors import RotaryExportError
from rotary_export.models.find.calls import Call
from rotary_export.models.find.rotation import (
    AXES,
    LAYOUTS,
    Rotation,
    Slot,
    compute_tables,
    read_polar,
    rotate_slots,
)

# Ours rounds as the function does, or once more where a scale is folded into the tables.
_MAX_ULP = 16
_MAX_ASSIGNMENTS = 24


class NotReplacedError(RotaryExportError):
    """A call that looks like a rotary embedding and is not replaced; the message says why."""


def find_rotation(call: Call) -> Rotation | None:
    """Find the rotation that a call computes.

    Args:
        call: As it was recorded; two positions or more.

    Returns:
        The rotation; None if the call applies no rotary embedding at all: it returns nothing
        shaped as an argument, or what it returns is not linear in it, or the same at all positions.

    Raises:
        NotReplacedError: It may apply one, but not one that the op computes.
    """
    results = [i for i, value in enumerate(call.output) if _is_rotatable(value)]
    sources = [i for i, value in enumerate(call.leaves) if _is_rotatable(value)]
    reason = None
    for slots in islice(_assign(call, sources, results), _MAX_ASSIGNMENTS):
        try:
            want = _Answer(call, slots)
            if not want.is_linear():
                continue
        except Exception as error:  # whatever the model's own function raises
            reason = f"it fails on random inputs: {type(error).__name__}: {_first_line(error)}"
            continue
        if not _covers_output(call, slots):
            reason = "it returns a tensor that is none of its arguments, rotated"
            continue
        is_constant = False
        for hypothesis in _make_hypotheses(call, slots, want):
            tables = want.explain(hypothesis)
            if tables is None:
                continue
            if all(_is_constant(table) for pair in tables for table in pair):
                is_constant = True
                break
            found = replace(hypothesis, polar=_find_polar(call, tables))
            return found if len(slots) != 2 else _join(found, call, tables)
        if not is_constant:
            reason = "no layout of the op gives what it gives on random inputs"
    if reason is None:
        return None
    raise NotReplacedError(reason)


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]


def _is_rotatable(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() in AXES and value.is_floating_point()


def _assign(call: Call, sources: list[int], results: list[int]) -> Iterator[tuple[Slot, ...]]:
    """Pair results with arguments of their shape and type, in order first."""

    def fits(result: int, source: int) -> bool:
        y, x = call.output[result], call.leaves[source]
        return y.shape == x.shape and y.dtype == x.dtype and y is not x

    matched = [r for r in results if any(fits(r, s) for s in sources)]
    if not matched:
        return
    for chosen in permutations(sources, len(matched)):
        if all(fits(r, s) for r, s in zip(matched, chosen, strict=True)):
            yield tuple(Slot(s, r) for r, s in zip(matched, chosen, strict=True))


def _covers_output(call: Call, slots: Sequence[Slot]) -> bool:
    """Whether every tensor that comes back is rotated, or an argument as it was."""
    rotated = {slot.result for slot in slots}
    return all(
        index in rotated or any(value is leaf for leaf in call.leaves)
        for index, value in enumerate(call.output)
        if isinstance(value, Tensor)
    )


class _Answer:
    """What a function answers to random inputs."""

    def __init__(self, call: Call, slots: tuple[Slot, ...]) -> None:
        self._call = call
        self._slots = slots
        generator = torch.Generator().manual_seed(0)
        self.inputs = []
        for slot in slots:
            x = call.leaves[slot.source]
            dtype = torch.promote_types(x.dtype, torch.float32)
            random = torch.randn(x.shape, generator=generator, dtype=dtype)
            self.inputs.append(random.to(x.device))
        self.outputs = self._run(self.inputs)

    def _run(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        leaves = list(self._call.leaves)
        for slot, value in zip(self._slots, inputs, strict=True):
            leaves[slot.source] = value
        args, kwargs = pytree.tree_unflatten(leaves, self._call.tree)
        with torch.no_grad():
            output = pytree.tree_leaves(self._call.target.function(*args, **kwargs))
        return [output[slot.result] for slot in self._slots]

    def is_linear(self) -> bool:
        """Whether each output is proportional to its input and to no other, and not that input."""
        if any(y.shape != x.shape for x, y in zip(self.inputs, self.outputs, strict=True)):
            return False
        factors = [2.0 * (index + 1) for index in range(len(self.inputs))]
        scaled = self._run([f * x for f, x in zip(factors, self.inputs, strict=True)])
        return all(
            bool((y != x).any()) and bool(y.any()) and is_close(got, f * y)
            for f, got, x, y in zip(factors, scaled, self.inputs, self.outputs, strict=True)
        )

    def explain(self, rotation: Rotation) -> list[tuple[Tensor, Tensor]] | None:
        """Return the tables with which the op gives the same; None if it does not."""
        call = self._call
        leaves = list(call.leaves)
        for slot, value in zip(self._slots, self.inputs, strict=True):
            leaves[slot.source] = value
        try:
            with torch.no_grad():
                tables = compute_tables(call.target.function, leaves, call.tree, rotation)
                got = rotate_slots(self.inputs, tables, rotation)
        except Exception:  # a hypothesis that the function or the op can't be called with
            return None
        fits = all(is_close(y, want) for y, want in zip(got, self.outputs, strict=True))
        return tables if fits else None


def is_close(got: Tensor, want: Tensor) -> bool:
    """Whether two results differ by rounding alone: in ulp of each head vector's magnitude."""
    if got.shape != want.shape:
        return False
    unit = torch.finfo(want.dtype).eps * want.abs().amax(dim=-1, keepdim=True)
    return bool(((got - want).abs() <= _MAX_ULP * unit).all())


def _is_constant(table: Tensor) -> bool:
    """Whether a table (B, S, R/2) is the same at every position of it."""
    return bool((table == table[:, :1]).all())


def _make_hypotheses(call: Call, slots: tuple[Slot, ...], want: _Answer) -> Iterator[Rotation]:
    x = call.leaves[slots[0].source]
    head_dims = {call.leaves[slot.source].shape[-1] for slot in slots}
    if len(head_dims) > 1:
        return
    for start, rotary_dim in _list_slices(call, slots, want):
        for whole_batch in (False, True):
            for axes in AXES[x.dim()]:
                if whole_batch and "B" not in axes:
                    continue
                for layout in LAYOUTS:
                    yield Rotation(slots, axes, layout, start, rotary_dim, whole_batch, False)


def _list_slices(call: Call, slots: tuple[Slot, ...], want: _Answer) -> list[tuple[int, int]]:
    """List (start, rotary_dim): as wide as the tables are, all channels, those that change."""
    head_dim = call.leaves[slots[0].source].shape[-1]
    sources = {slot.source for slot in slots}
    tables = [
        leaf.shape[-1]
        for index, leaf in enumerate(call.leaves)
        if isinstance(leaf, Tensor) and leaf.dim() and index not in sources
    ]
    widths = [w for width in dict.fromkeys(tables) for w in (width, 2 * width, width // 2)]
    found = [(start, width) for width in widths for start in (0, head_dim - width)]
    changed = (want.inputs[0] != want.outputs[0]).flatten(0, -2).any(0).nonzero().flatten()
    first, last = int(changed[0]), int(changed[-1]) + 1  # something does: it is not the identity
    # Channels that don't change may be those of a frequency of zero, which are rotated, too.
    own = [(first, last - first)]
    found = (
        found + own + [(0, head_dim)] if last - first in widths else [*found, (0, head_dim), *own]
    )
    fits = [s for s in found if s[0] >= 0 and s[1] >= 2 and s[1] % 2 == 0 and sum(s) <= head_dim]
    return list(dict.fromkeys(fits))


def _find_polar(call: Call, tables: list[tuple[Tensor, Tensor]]) -> int | None:
    """Find a complex argument that holds the tables: few exporters know complex arithmetic."""
    for index, leaf in enumerate(call.leaves):
        if not isinstance(leaf, Tensor) or not leaf.is_complex() or leaf.dim() not in (2, 3):
            continue
        parts = read_polar(leaf)
        if all(torch.equal(a, b) for pair in tables for a, b in zip(pair, parts, strict=True)):
            return index
    return None


def _join(rotation: Rotation, call: Call, tables: list[tuple[Tensor, Tensor]]) -> Rotation:
    """Let one node rotate query and key, if they take the same tables."""
    heads = rotation.axes.find("N")
    query, key = (list(call.leaves[slot.source].shape) for slot in rotation.slots)
    if heads >= 0:
        del query[heads], key[heads]
    same = all(torch.equal(a, b) for a, b in zip(*tables, strict=True))
    return replace(rotation, joined=same and query == key)
