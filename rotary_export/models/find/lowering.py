"""How a call of a model's own function maps onto the op, and the op in its place.

Tables are not read from the arguments. A rotation is linear: given 1 in the first member of each
pair and 0 in the second, the function itself returns the cosines and sines, times xPos's scale or
an attention factor. That input is one small tensor, with one head. A factor that differs in a pair
is found with a second tensor, 1 in the second member of each pair; it stays a product.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rotary_export.compat import pytree
from rotary_export.models.find.axes import count_heads, flatten_table, from_op, to_op
from rotary_export.models.find.calls import call_with
from rotary_export.models.find.redirect import OwnFunction
from rotary_export.op.torch_op import rotary_embedding

LAYOUTS = ("half", "interleaved", "deinterleaved")

Tables = tuple[Tensor, Tensor]  # cos, sin: (B or 1, S, R/2)


@dataclass(frozen=True)
class Slot:
    """A tensor that is rotated.

    Attributes:
        source: Its index among the flattened arguments.
        result: Its index among the flattened results.
        promoted: Its result has the wider type of the tables: they are float32, it is half.
    """

    source: int
    result: int
    promoted: bool = False


@dataclass(frozen=True)
class Lowering:
    """How a call of a function maps onto the op.

    Attributes:
        slots: The tensors that it rotates.
        axes: The names of their dimensions: see `axes`.
        layout: "half"; "interleaved"; or "deinterleaved" (DeepSeek): pairs (2i, 2i + 1) are
            returned as (i, i + R/2).
        start: First channel that is rotated.
        rotary_dim: R, number of channels from there on.
        whole_batch: The function requires probes of X's own batch; else one row is enough.
        joined: Both slots have the same tables: one node rotates query and key.
        polar: Index of a complex argument whose parts are the tables; None: a probe returns them.
        has_factor: The rotated tensors are multiplied by a factor that differs in a pair.
        head_dim: The function splits the heads itself: the last dimension is N * head_dim. `axes`
            names these two apart. None: the last dimension is that of one head.
    """

    slots: tuple[Slot, ...]
    axes: str
    layout: str
    start: int
    rotary_dim: int
    whole_batch: bool
    joined: bool
    polar: int | None = None
    has_factor: bool = False
    head_dim: int | None = None

    def __str__(self) -> str:
        channels = f"channels {self.start} to {self.start + self.rotary_dim}"
        axes = self.axes if self.head_dim is None else f"{self.axes[:-2]}({self.axes[-2:]})"
        factor = ", times a factor of each channel" if self.has_factor else ""
        return f"{self.layout}, {channels}, {axes}{factor}"

    def split_heads(self, x: Tensor) -> Tensor:
        """Return x, or a result, with the dimensions that `axes` names."""
        return x if self.head_dim is None else x.unflatten(-1, (-1, self.head_dim))

    def merge_heads(self, y: Tensor) -> Tensor:
        """Undo `split_heads`."""
        return y if self.head_dim is None else y.flatten(-2)

    def list_sizes(self, x: Tensor) -> list[tuple[str, Any]]:
        """Return the names of the dimensions of x, with its sizes."""
        sizes = list(x.shape)
        if self.head_dim is not None:
            sizes[-1:] = [x.shape[-1] // self.head_dim, self.head_dim]
        return list(zip(self.axes, sizes, strict=True))


@dataclass(frozen=True)
class CallTables:
    """What the op reads for a call.

    Attributes:
        tables: cos and sin of each slot.
        factors: What the results of each slot are multiplied by; None: nothing.
    """

    tables: list[Tables]
    factors: list[Tensor] | None = None


def make_probe(x: Tensor, lowering: Lowering, *, second: bool = False) -> Tensor:
    """Make the tensor that a function rotates into its tables.

    Args:
        x: What the function rotates.
        lowering: How.
        second: Probe the second members of the pairs, and the channels that are not rotated.

    Returns:
        1 in the first member of each pair, 0 elsewhere; with `second`, the reverse. Sizes are
        those of x, but with one head and, unless `whole_batch`, a batch of 1. Heads that the
        function splits itself are all there. Float32, or x's float64.
    """
    first = range(lowering.start, lowering.start + lowering.rotary_dim // 2)
    if lowering.layout != "half":
        first = range(lowering.start, lowering.start + lowering.rotary_dim, 2)
    head_dim = x.shape[-1] if lowering.head_dim is None else lowering.head_dim
    unit = torch.tensor(
        [float((channel % head_dim in first) != second) for channel in range(x.shape[-1])],
        dtype=torch.promote_types(x.dtype, torch.float32),
        device=x.device,
    )
    sizes = []
    for size, name in zip(x.shape[:-1], lowering.axes, strict=False):
        one = name == "N" or (name == "B" and not lowering.whole_batch)
        sizes.append(1 if one else size)
    return unit.expand(*sizes, -1)


def compute_tables(
    own: OwnFunction, leaves: Sequence[Any], tree: pytree.TreeSpec, lowering: Lowering
) -> CallTables:
    """Compute the tables of each slot, by calling the function.

    Args:
        own: The model's own function.
        leaves: What it reads, flattened.
        tree: How they are nested.
        lowering: How the call maps onto the op.

    Returns:
        cos and sin, (B or 1, S, R/2), per slot. Where a factor differs in a pair, they contain
        that of the pair's first member, and the factors are 1 there.
    """
    if lowering.polar is not None:
        return CallTables([read_polar(leaves[lowering.polar])] * len(lowering.slots))

    def probe(second: bool) -> list[Tensor]:
        probes = list(leaves)
        for slot in lowering.slots:
            probes[slot.source] = make_probe(leaves[slot.source], lowering, second=second)
        output = call_with(own, probes, tree)
        return [output[slot.result] for slot in lowering.slots]

    pairs = [_split_pairs(turned, lowering) for turned in probe(False)]
    if not lowering.has_factor:
        tables = [
            (flatten_table(a, lowering.axes), flatten_table(b, lowering.axes)) for a, b in pairs
        ]
        return CallTables(tables)
    tables, factors = [], []
    for (cos, sin_b), turned in zip(pairs, probe(True), strict=True):
        minus_sin, cos_b = _split_pairs(turned, lowering)
        sin = -minus_sin
        ratio = (cos_b * cos + sin_b * sin) / (cos * cos + sin * sin)
        tables.append((flatten_table(cos, lowering.axes), flatten_table(sin, lowering.axes)))
        factors.append(_fill_factor(ratio, turned, lowering))
    return CallTables(tables, factors)


def _split_pairs(turned: Tensor, lowering: Lowering) -> Tables:
    """Return the first and the second members of the pairs, (..., R/2) each."""
    turned = lowering.split_heads(turned)
    turned = turned[..., lowering.start : lowering.start + lowering.rotary_dim]
    if lowering.layout == "interleaved":
        return turned[..., 0::2], turned[..., 1::2]
    half = lowering.rotary_dim // 2
    return turned[..., :half], turned[..., half:]


def _fill_factor(ratio: Tensor, turned: Tensor, lowering: Lowering) -> Tensor:
    """Return the factor of every channel (..., H): 1, the ratio in a pair, that of the others."""
    turned = lowering.split_heads(turned)
    parts = (torch.ones_like(ratio), ratio)
    both = torch.cat(parts, -1)
    if lowering.layout == "interleaved":
        both = torch.stack(parts, -1).flatten(-2)
    end = lowering.start + lowering.rotary_dim
    return lowering.merge_heads(
        torch.cat((turned[..., : lowering.start], both, turned[..., end:]), -1)
    )


def read_polar(turns: Tensor) -> Tables:
    """Return the cosines and sines of complex numbers (S, R/2) or (B or 1, S, R/2)."""
    parts = torch.view_as_real(turns)
    parts = parts if turns.dim() == 3 else parts[None]
    return parts[..., 0], parts[..., 1]


def rotate_call(
    xs: Sequence[Tensor],
    found: CallTables,
    lowering: Lowering,
    rotate: Callable[[Sequence[Tensor], Sequence[Tables], Lowering], list[Tensor]],
) -> list[Tensor]:
    """Compute with the op what a call returns.

    A half tensor is made as wide as its tables first where the function does so, too, or where a
    factor follows: the result is rounded once.

    Args:
        xs: The tensors of the slots.
        found: What the op reads.
        lowering: How the call maps onto the op.
        rotate: `rotate_slots`.

    Returns:
        The results of the slots.
    """
    wide = [
        x.to(torch.promote_types(x.dtype, cos.dtype)) if slot.promoted or lowering.has_factor else x
        for x, slot, (cos, _) in zip(xs, lowering.slots, found.tables, strict=True)
    ]
    rotated = rotate(wide, found.tables, lowering)
    if found.factors is None:
        return rotated
    return [
        y * factor if slot.promoted else (y * factor).to(x.dtype)
        for x, y, factor, slot in zip(xs, rotated, found.factors, lowering.slots, strict=True)
    ]


def rotate_slots(
    xs: Sequence[Tensor], tables: Sequence[Tables], lowering: Lowering
) -> list[Tensor]:
    """Rotate with the op what a call rotates.

    Args:
        xs: The tensors of the slots.
        tables: cos and sin, per slot.
        lowering: How the call maps onto the op.

    Returns:
        As xs.
    """
    if lowering.joined:
        query, key = xs
        return list(_rotate(query, tables[0], lowering, key))
    return [_rotate(x, table, lowering)[0] for x, table in zip(xs, tables, strict=True)]


def _rotate(
    x: Tensor, tables: Tables, lowering: Lowering, key: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Rotate one tensor, or query and key."""
    inputs = [x] if key is None else [x, key]
    parts = [bring_to_op(value, lowering) for value in inputs]
    heads = [count_heads(lowering.split_heads(value), lowering.axes) for value in inputs] + [0]
    rotated = rotary_embedding(
        parts[0],
        *tables,
        key=parts[1] if key is not None else None,
        interleaved=lowering.layout == "interleaved",
        rotary_dim=lowering.rotary_dim,
        num_heads=heads[0],
        kv_num_heads=heads[1],
    )
    y, *rest = [
        _from_op(part, value, lowering) for part, value in zip(rotated, inputs, strict=False)
    ]
    return y, rest[0] if rest else rotated[1]


def _is_sliced(x: Tensor, lowering: Lowering) -> bool:
    """Return whether the rotated channels must be sliced: the op rotates only leading ones."""
    partial = lowering.rotary_dim < x.shape[-1]
    return lowering.start > 0 or (partial and lowering.layout == "deinterleaved")


def bring_to_op(x: Tensor, lowering: Lowering) -> Tensor:
    """Bring x into a form of the op."""
    x = lowering.split_heads(x)
    if _is_sliced(x, lowering):
        x = x[..., lowering.start : lowering.start + lowering.rotary_dim]
    if lowering.layout == "deinterleaved":
        x = x.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)
    return to_op(x, lowering.axes)


def _from_op(y: Tensor, x: Tensor, lowering: Lowering) -> Tensor:
    """Undo `bring_to_op`, except for the order of the channels of a pair."""
    x = lowering.split_heads(x)
    y = from_op(y, x, lowering.axes)
    if _is_sliced(x, lowering):
        end = lowering.start + lowering.rotary_dim
        y = torch.cat((x[..., : lowering.start], y, x[..., end:]), dim=-1)
    return lowering.merge_heads(y)
