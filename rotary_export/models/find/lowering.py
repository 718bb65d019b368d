"""How a call of a model's own function maps onto the op, and the op in its place.

Tables are not read from the arguments. A rotation is linear: given 1 in the first member of each
pair and 0 in the second, the function itself returns the cosines and sines, times xPos's scale or
an attention factor. That input is one small tensor, with one head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rotary_export.compat import pytree
from rotary_export.models.find.calls import call_with
from rotary_export.models.find.redirect import OwnFunction
from rotary_export.op.torch_op import rotary_embedding

LAYOUTS = ("half", "interleaved", "deinterleaved")
# Dimensions of a rotated tensor, by its rank: B batch, N heads, S sequence, H head_dim.
AXES = {4: ("BNSH", "BSNH"), 3: ("SNH", "BSH", "NSH")}

Tables = tuple[Tensor, Tensor]  # cos, sin: (B or 1, S, R/2)


@dataclass(frozen=True)
class Slot:
    """A tensor that is rotated.

    Attributes:
        source: Its index among the flattened arguments.
        result: Its index among the flattened results.
    """

    source: int
    result: int


@dataclass(frozen=True)
class Lowering:
    """How a call of a function maps onto the op.

    Attributes:
        slots: The tensors that it rotates.
        axes: Their dimensions, one of `AXES`.
        layout: "half"; "interleaved"; or "deinterleaved" (DeepSeek): pairs (2i, 2i + 1) are
            returned as (i, i + R/2).
        start: First channel that is rotated.
        rotary_dim: R, number of channels from there on.
        whole_batch: The function requires probes of X's own batch; else one row is enough.
        joined: Both slots have the same tables: one node rotates query and key.
        polar: Index of a complex argument whose parts are the tables; None: a probe returns them.
    """

    slots: tuple[Slot, ...]
    axes: str
    layout: str
    start: int
    rotary_dim: int
    whole_batch: bool
    joined: bool
    polar: int | None = None

    def __str__(self) -> str:
        channels = f"channels {self.start} to {self.start + self.rotary_dim}"
        return f"{self.layout}, {channels}, {self.axes}"


def make_probe(x: Tensor, lowering: Lowering) -> Tensor:
    """Make the tensor that a function rotates into its tables.

    Args:
        x: What the function rotates.
        lowering: How.

    Returns:
        1 in the first member of each pair, 0 elsewhere. Sizes are those of x, but with one head
        and, unless `whole_batch`, a batch of 1. Float32, or x's float64.
    """
    first = range(lowering.start, lowering.start + lowering.rotary_dim // 2)
    if lowering.layout != "half":
        first = range(lowering.start, lowering.start + lowering.rotary_dim, 2)
    unit = torch.tensor(
        [float(channel in first) for channel in range(x.shape[-1])],
        dtype=torch.promote_types(x.dtype, torch.float32),
        device=x.device,
    )
    sizes = []
    for axis, name in enumerate(lowering.axes):
        one = name == "N" or (name == "B" and not lowering.whole_batch)
        sizes.append(1 if one else x.shape[axis])
    return unit.expand(sizes)


def compute_tables(
    own: OwnFunction, leaves: Sequence[Any], tree: pytree.TreeSpec, lowering: Lowering
) -> list[Tables]:
    """Compute the tables of each slot, by calling the function.

    Args:
        own: The model's own function.
        leaves: What it reads, flattened.
        tree: How they are nested.
        lowering: How the call maps onto the op.

    Returns:
        cos and sin, (B or 1, S, R/2), per slot.
    """
    if lowering.polar is not None:
        return [read_polar(leaves[lowering.polar])] * len(lowering.slots)
    probes = list(leaves)
    for slot in lowering.slots:
        probes[slot.source] = make_probe(leaves[slot.source], lowering)
    output = call_with(own, probes, tree)
    half = lowering.rotary_dim // 2
    tables = []
    for slot in lowering.slots:
        turned = output[slot.result]
        if "N" in lowering.axes:
            turned = turned.select(lowering.axes.index("N"), 0)
        if "B" not in lowering.axes:
            turned = turned[None]
        turned = turned[..., lowering.start : lowering.start + lowering.rotary_dim]  # (B, S, R)
        if lowering.layout == "interleaved":
            tables.append((turned[..., 0::2], turned[..., 1::2]))
        else:
            tables.append((turned[..., :half], turned[..., half:]))
    return tables


def read_polar(turns: Tensor) -> Tables:
    """Return the cosines and sines of complex numbers (S, R/2) or (B or 1, S, R/2)."""
    parts = torch.view_as_real(turns)
    parts = parts if turns.dim() == 3 else parts[None]
    return parts[..., 0], parts[..., 1]


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
    parts = [to_op(value, lowering) for value in inputs]
    heads = [_count_heads(value, lowering) for value in inputs] + [0]
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


def _count_heads(x: Tensor, lowering: Lowering) -> int:
    """Return the number of heads that a 3-D X packs; 0 for a 4-D one."""
    if lowering.axes in ("BNSH", "NSH"):
        return 0
    return 1 if lowering.axes == "BSH" else int(x.shape[lowering.axes.index("N")])


def _is_sliced(x: Tensor, lowering: Lowering) -> bool:
    """Return whether the rotated channels must be sliced: the op rotates only leading ones."""
    partial = lowering.rotary_dim < x.shape[-1]
    return lowering.start > 0 or (partial and lowering.layout == "deinterleaved")


def to_op(x: Tensor, lowering: Lowering) -> Tensor:
    """Bring x into a shape of the op: (B, N, S, H) or (B, S, N*H)."""
    if _is_sliced(x, lowering):
        x = x[..., lowering.start : lowering.start + lowering.rotary_dim]
    if lowering.layout == "deinterleaved":
        x = x.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)
    if lowering.axes in ("SNH", "NSH"):
        x = x[None]
    return x.flatten(2) if lowering.axes in ("BSNH", "SNH") else x


def _from_op(y: Tensor, x: Tensor, lowering: Lowering) -> Tensor:
    """Undo `to_op`, except for the order of the channels of a pair."""
    if lowering.axes in ("BSNH", "SNH"):
        y = y.unflatten(2, (_count_heads(x, lowering), -1))
    if lowering.axes in ("SNH", "NSH"):
        y = y[0]
    if _is_sliced(x, lowering):
        end = lowering.start + lowering.rotary_dim
        y = torch.cat((x[..., : lowering.start], y, x[..., end:]), dim=-1)
    return y
