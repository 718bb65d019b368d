"""Finds what a function computes by calling it; no source is parsed.

A hypothesis names tensors, dimensions, channels and a layout. It is accepted only if the op, with
the tables that the function itself returns for it, equals the function on random inputs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice, permutations, product
from typing import Any

import torch
from torch import Tensor

from rotary_export.errors import RotaryExportError, first_line
from rotary_export.models.find.axes import AXES, MAX_RANK, derive_axes
from rotary_export.models.find.calls import RecordedCall, call_with
from rotary_export.models.find.lowering import (
    LAYOUTS,
    Lowering,
    Slot,
    Tables,
    compute_tables,
    read_polar,
    rotate_call,
    rotate_slots,
)

# The op rounds as the function does, or once more where a scale is folded into the tables.
_MAX_ULP = 16
_MAX_ASSIGNMENTS = 24


class NotReplacedError(RotaryExportError):
    """A call that may be a rotary embedding and is not replaced; the message is the reason."""


def find_lowering(call: RecordedCall) -> Lowering | None:
    """Find how a call maps onto the op.

    Args:
        call: As it was recorded; two positions or more.

    Returns:
        The lowering. None if the call applies no rotary embedding at all: no result has the shape
        of an argument, or it is not linear in it, or it is the same at all positions.

    Raises:
        NotReplacedError: It may apply one, but not one that the op computes.
    """
    results = [i for i, value in enumerate(call.output) if _is_rotatable(value)]
    sources = [i for i, value in enumerate(call.leaves) if _is_rotatable(value)]
    reason = None
    for slots in islice(_assign(call, sources, results), _MAX_ASSIGNMENTS):
        try:
            probed = _ProbedCall(call, slots)
            if not probed.is_linear():
                continue
            varies = probed.find_varying()
        except Exception as error:  # whatever the model's own function raises
            reason = f"it fails on random inputs: {type(error).__name__}: {first_line(error)}"
            continue
        if not _covers_output(call, slots):
            reason = "it returns a tensor that is not one of its arguments, rotated"
            continue
        is_constant = not any(varies)
        for hypothesis in () if is_constant else _make_hypotheses(call, slots, probed, varies):
            tables = probed.find_tables(hypothesis)
            if tables is None or all(_is_constant(table) for pair in tables for table in pair):
                continue  # or it differs along another axis
            if not any(bool(sin.any()) for _, sin in tables):
                is_constant = True  # it scales, and turns nothing
                break
            found = replace(hypothesis, polar=_find_polar(call, tables))
            return found if len(slots) != 2 else _join(found, call, tables)
        if not is_constant:
            reason = "in no layout does the op equal it on random inputs"
    if reason is None:
        return None
    raise NotReplacedError(reason)


def _is_rotatable(value: Any) -> bool:
    return isinstance(value, Tensor) and 2 <= value.dim() <= MAX_RANK and value.is_floating_point()


def _assign(
    call: RecordedCall, sources: list[int], results: list[int]
) -> Iterator[tuple[Slot, ...]]:
    """Pair results with arguments of their shape and type, or a narrower one, in order first."""

    def fits(result: int, source: int) -> bool:
        y, x = call.output[result], call.leaves[source]
        is_wide = torch.promote_types(x.dtype, y.dtype) == y.dtype
        return y.shape == x.shape and is_wide and y is not x

    matched = [r for r in results if any(fits(r, s) for s in sources)]
    if not matched:
        return
    for chosen in permutations(sources, len(matched)):
        if all(fits(r, s) for r, s in zip(matched, chosen, strict=True)):
            yield tuple(
                Slot(s, r, call.output[r].dtype != call.leaves[s].dtype)
                for r, s in zip(matched, chosen, strict=True)
            )


def _covers_output(call: RecordedCall, slots: Sequence[Slot]) -> bool:
    """Return whether every tensor of the result is rotated, or an unchanged argument."""
    rotated = {slot.result for slot in slots}
    return all(
        index in rotated or any(value is leaf for leaf in call.leaves)
        for index, value in enumerate(call.output)
        if isinstance(value, Tensor)
    )


class _ProbedCall:
    """A call, repeated with random tensors in its slots.

    Args:
        call: As it was recorded.
        slots: The tensors that are replaced by random ones.
    """

    def __init__(self, call: RecordedCall, slots: tuple[Slot, ...]) -> None:
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

    def _fill(self, inputs: Sequence[Tensor]) -> list[Any]:
        leaves = list(self._call.leaves)
        for slot, value in zip(self._slots, inputs, strict=True):
            leaves[slot.source] = value
        return leaves

    def _run(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        with torch.no_grad():
            output = call_with(self._call.own, self._fill(inputs), self._call.tree)
        return [output[slot.result] for slot in self._slots]

    def is_linear(self) -> bool:
        """Return whether each output is a multiple of its input alone, and not that input."""
        if any(y.shape != x.shape for x, y in zip(self.inputs, self.outputs, strict=True)):
            return False
        factors = [2.0 * (index + 1) for index in range(len(self.inputs))]
        scaled = self._run([f * x for f, x in zip(factors, self.inputs, strict=True)])
        return all(
            bool((y != x).any()) and bool(y.any()) and is_close(got, f * y)
            for f, got, x, y in zip(factors, scaled, self.inputs, self.outputs, strict=True)
        )

    def find_varying(self) -> list[bool]:
        """Return for each dimension but the last whether the rotation differs along it."""
        generator = torch.Generator().manual_seed(1)
        rows = []
        for x in self.inputs:
            row = torch.randn(x.shape[-1], generator=generator, dtype=x.dtype)
            rows.append(row.to(x.device).expand(x.shape).contiguous())
        outputs = self._run(rows)
        return [
            any(bool((y != y.narrow(axis, 0, 1)).any()) for y in outputs)
            for axis in range(outputs[0].dim() - 1)
        ]

    def find_head_dim(self) -> int | None:
        """Return the width of the heads that the function splits itself; None: it splits none.

        All heads turn alike: where the heads of x change places, those of the result do so, too.
        """
        width = self.inputs[0].shape[-1]
        for head_dim in range(2, width // 2 + 1, 2):
            if width % head_dim == 0 and self._commutes_with_roll(head_dim):
                return head_dim
        return None

    def _commutes_with_roll(self, channels: int) -> bool:
        rolled = self._run([x.roll(channels, -1) for x in self.inputs])
        return all(
            is_close(got, y.roll(channels, -1)) for got, y in zip(rolled, self.outputs, strict=True)
        )

    def find_tables(self, lowering: Lowering) -> list[Tables] | None:
        """Return the tables with which the op equals the function; None if it does not."""
        leaves = self._fill(self.inputs)
        try:
            with torch.no_grad():
                found = compute_tables(self._call.own, leaves, self._call.tree, lowering)
                got = rotate_call(self.inputs, found, lowering, rotate_slots)
        except Exception:  # a hypothesis with which the function or the op can't be called
            return None
        fits = all(
            is_close(lowering.split_heads(y), lowering.split_heads(want))
            for y, want in zip(got, self.outputs, strict=True)
        )
        return found.tables if fits else None


def is_close(got: Tensor, want: Tensor) -> bool:
    """Return whether two results differ by rounding alone: ulp of each head vector's magnitude."""
    if got.shape != want.shape:
        return False
    unit = torch.finfo(want.dtype).eps * want.abs().amax(dim=-1, keepdim=True)
    return bool(((got - want).abs() <= _MAX_ULP * unit).all())


def _is_constant(table: Tensor) -> bool:
    """Return whether a table (B, S, R/2) is the same at every position."""
    return bool((table == table[:, :1]).all())


def _make_hypotheses(
    call: RecordedCall, slots: tuple[Slot, ...], probed: _ProbedCall, varies: Sequence[bool]
) -> Iterator[Lowering]:
    """Yield hypotheses: first without a factor, and with the usual dimensions.

    Last, those of a function that splits the heads itself.
    """
    x = call.leaves[slots[0].source]
    if len({(call.leaves[s.source].dim(), call.leaves[s.source].shape[-1]) for s in slots}) > 1:
        return
    usual, derived = AXES.get(x.dim(), ()), derive_axes(varies)
    slices = _list_slices(call, slots, probed, x.shape[-1])
    yield from _combine(slots, usual, derived, slices)
    head_dim = probed.find_head_dim()
    if head_dim is not None:
        packed = [_add_heads(axes) for axes in usual if "N" not in axes]
        slices = _list_slices(call, slots, probed, head_dim)
        for each in _combine(slots, packed, _add_heads(derived), slices):
            yield replace(each, head_dim=head_dim)


def _add_heads(axes: str) -> str:
    """Name the heads that the last dimension contains, too."""
    return f"{axes[:-1]}NH"


def _combine(
    slots: tuple[Slot, ...], usual: Sequence[str], derived: str, slices: Sequence[tuple[int, int]]
) -> Iterator[Lowering]:
    for has_factor, dimensions in product((False, True), (usual, (derived,))):
        for (start, rotary_dim), whole_batch, axes, layout in product(
            slices, (False, True), dimensions, LAYOUTS
        ):
            if "B" in axes or not whole_batch:
                yield Lowering(
                    slots,
                    axes,
                    layout,
                    start,
                    rotary_dim,
                    whole_batch,
                    joined=False,
                    has_factor=has_factor,
                )


def _list_slices(
    call: RecordedCall, slots: tuple[Slot, ...], probed: _ProbedCall, head_dim: int
) -> list[tuple[int, int]]:
    """List (start, rotary_dim): as wide as the tables are, all channels, those that change."""
    sources = {slot.source for slot in slots}
    tables = [
        leaf.shape[-1]
        for index, leaf in enumerate(call.leaves)
        if isinstance(leaf, Tensor) and leaf.dim() and index not in sources
    ]
    widths = [w for width in dict.fromkeys(tables) for w in (width, 2 * width, width // 2)]
    found = [(start, width) for width in widths for start in (0, head_dim - width)]
    differs = (probed.inputs[0] != probed.outputs[0]).unflatten(-1, (-1, head_dim))
    changed = differs.flatten(0, -2).any(0).nonzero().flatten()
    first, last = int(changed[0]), int(changed[-1]) + 1  # something does: it is not the identity
    # Channels that don't change may be those of a frequency of zero, which are rotated, too.
    own = [(first, last - first)]
    found = (
        found + own + [(0, head_dim)] if last - first in widths else [*found, (0, head_dim), *own]
    )
    fits = [s for s in found if s[0] >= 0 and s[1] >= 2 and s[1] % 2 == 0 and sum(s) <= head_dim]
    return list(dict.fromkeys(fits))


def _find_polar(call: RecordedCall, tables: list[Tables]) -> int | None:
    """Find a complex argument that holds the tables: few exporters support complex arithmetic."""
    for index, leaf in enumerate(call.leaves):
        if not isinstance(leaf, Tensor) or not leaf.is_complex() or leaf.dim() not in (2, 3):
            continue
        parts = read_polar(leaf)
        if all(torch.equal(a, b) for pair in tables for a, b in zip(pair, parts, strict=True)):
            return index
    return None


def _join(lowering: Lowering, call: RecordedCall, tables: list[Tables]) -> Lowering:
    """Let one node rotate query and key, if they have the same tables."""
    query, key = (
        [size for name, size in lowering.list_sizes(call.leaves[slot.source]) if name != "N"]
        for slot in lowering.slots
    )
    same = all(torch.equal(a, b) for a, b in zip(*tables, strict=True))
    return replace(lowering, joined=same and query == key)
