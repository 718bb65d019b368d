"""What a call of a model's own function computes, as our op says it; and the op in its place.

Tables are not parsed out of the arguments: a rotation is linear, so the function itself, given the
first member of each pair as 1 and the second as 0, returns the cosines and sines (times xPos's
scale or an attention factor), whatever it takes them from. That is one small tensor, with one head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rotary_export.models.find.calls import Function
from rotary_export.op.torch_op import rotary_embedding

LAYOUTS = ("half", "interleaved", "deinterleaved")
# Dimensions of what is rotated, by its rank; B batch, N heads, S sequence, H head_dim.
AXES = {4: ("BNSH", "BSNH"), 3: ("SNH", "BSH", "NSH")}

Tables = tuple[Tensor, Tensor]  # cos, sin: (B or 1, S, R/2)


@dataclass(frozen=True)
class Slot:
    """A tensor that is rotated.

    Attributes:
        source: Its place among the flattened arguments.
        result: Its place among the flattened results.
    """

    source: int
    result: int


@dataclass(frozen=True)
class Rotation:
    """A rotary embedding as a function applies it.

    Attributes:
        slots: The tensors that it rotates.
        axes: What their dimensions are, one of `AXES`.
        layout: "half"; "interleaved"; or "deinterleaved": pairs (2i, 2i + 1) come out as
            (i, i + R/2), which is DeepSeek's.
        start: First channel that is rotated.
        rotary_dim: R, channels from there on.
        whole_batch: The function needs probes of X's own batch; else one row is enough.
        joined: Both slots take the same tables: one node rotates query and key.
        polar: Place of a complex argument whose parts are the tables; None: the function is asked.
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
        where = f"channels {self.start} to {self.start + self.rotary_dim}"
        return f"{self.layout}, {where}, {self.axes}"


def make_probe(x: Tensor, rotation: Rotation) -> Tensor:
    """Make the tensor to which a function answers with its tables.

    Args:
        x: What the function rotates.
        rotation: How.

    Returns:
        1 in the first member of each pair, 0 elsewhere; sizes as x, but for one head and, unless
        `whole_batch`, a batch of 1. Float32, or x's float64.
    """
    first = range(rotation.start, rotation.start + rotation.rotary_dim // 2)
    if rotation.layout != "half":
        first = range(rotation.start, rotation.start + rotation.rotary_dim, 2)
    unit = torch.tensor(
        [float(channel in first) for channel in range(x.shape[-1])],
        dtype=torch.promote_types(x.dtype, torch.float32),
        device=x.device,
    )
    sizes = []
    for axis, name in enumerate(rotation.axes):
        one = name == "N" or (name == "B" and not rotation.whole_batch)
        sizes.append(1 if one else x.shape[axis])
    return unit.expand(sizes)


def compute_tables(
    function: Function, leaves: Sequence[Any], tree: Any, rotation: Rotation
) -> list[Tables]:
    """Compute the tables of each slot, by calling the function.

    Args:
        function: The model's own.
        leaves: The arguments of the call, flattened.
        tree: How they are nested.
        rotation: What it computes.

    Returns:
        cos and sin, (B or 1, S, R/2), per slot.
    """
    if rotation.polar is not None:
        return [read_polar(leaves[rotation.polar])] * len(rotation.slots)
    probes = list(leaves)
    for slot in rotation.slots:
        probes[slot.source] = make_probe(leaves[slot.source], rotation)
    args, kwargs = torch.utils._pytree.tree_unflatten(probes, tree)
    output = torch.utils._pytree.tree_leaves(function(*args, **kwargs))
    half = rotation.rotary_dim // 2
    tables = []
    for slot in rotation.slots:
        turned = output[slot.result]
        if "N" in rotation.axes:
            turned = turned.select(rotation.axes.index("N"), 0)
        if "B" not in rotation.axes:
            turned = turned[None]
        turned = turned[..., rotation.start : rotation.start + rotation.rotary_dim]  # (B, S, R)
        if rotation.layout == "interleaved":
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
    xs: Sequence[Tensor], tables: Sequence[Tables], rotation: Rotation
) -> list[Tensor]:
    """Rotate what a call rotates, by the op.

    Args:
        xs: The tensors of the slots.
        tables: cos and sin, per slot.
        rotation: How.

    Returns:
        As xs.
    """
    if rotation.joined:
        query, key = xs
        return list(_rotate(query, tables[0], rotation, key))
    return [_rotate(x, table, rotation)[0] for x, table in zip(xs, tables, strict=True)]


def _rotate(
    x: Tensor, tables: Tables, rotation: Rotation, key: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Rotate one tensor, or query and key."""
    inputs = [x] if key is None else [x, key]
    parts = [_to_op(value, rotation) for value in inputs]
    heads = [_count_heads(value, rotation) for value in inputs] + [0]
    rotated = rotary_embedding(
        parts[0],
        *tables,
        key=parts[1] if key is not None else None,
        interleaved=rotation.layout == "interleaved",
        rotary_dim=rotation.rotary_dim,
        num_heads=heads[0],
        kv_num_heads=heads[1],
    )
    y, *rest = [
        _from_op(part, value, rotation) for part, value in zip(rotated, inputs, strict=False)
    ]
    return y, rest[0] if rest else rotated[1]


def _count_heads(x: Tensor, rotation: Rotation) -> int:
    """Return the heads that a 3-D X packs; 0 for a 4-D one."""
    if rotation.axes in ("BNSH", "NSH"):
        return 0
    return 1 if rotation.axes == "BSH" else int(x.shape[rotation.axes.index("N")])


def _is_cut(x: Tensor, rotation: Rotation) -> bool:
    """Whether the rotated channels have to be cut out: the op knows leading ones only."""
    partial = rotation.rotary_dim < x.shape[-1]
    return rotation.start > 0 or (partial and rotation.layout == "deinterleaved")


def _to_op(x: Tensor, rotation: Rotation) -> Tensor:
    """Bring x into one of the op's forms: (B, N, S, H) or (B, S, N*H)."""
    if _is_cut(x, rotation):
        x = x[..., rotation.start : rotation.start + rotation.rotary_dim]
    if rotation.layout == "deinterleaved":
        x = x.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)
    if rotation.axes in ("SNH", "NSH"):
        x = x[None]
    return x.flatten(2) if rotation.axes in ("BSNH", "SNH") else x


def _from_op(y: Tensor, x: Tensor, rotation: Rotation) -> Tensor:
    """Undo `_to_op`, but for the order of the channels of a pair."""
    if rotation.axes in ("BSNH", "SNH"):
        y = y.unflatten(2, (_count_heads(x, rotation), -1))
    if rotation.axes in ("SNH", "NSH"):
        y = y[0]
    if _is_cut(x, rotation):
        end = rotation.start + rotation.rotary_dim
        y = torch.cat((x[..., : rotation.start], y, x[..., end:]), dim=-1)
    return y
