"""How the dimensions of a rotated tensor map onto those of the op.

A letter names each dimension: B batch, N heads, S sequence, H head_dim. The op accepts (B, N, S, H)
and (B, S, N*H). Several dimensions may be S, as frames, rows and columns of a video, or N: they are
flattened, and so are the tables.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

# By the number of dimensions, the usual ones.
AXES = {4: ("BNSH", "BSNH"), 3: ("SNH", "BSH", "NSH")}
MAX_RANK = 7


def derive_axes(varies: Sequence[bool]) -> str:
    """Name dimensions by whether the rotation differs along each of them; the last is H.

    Where it differs, a dimension belongs to the sequence. The first of the others is the batch.
    """
    names = ["S" if differs else "N" for differs in varies]
    if "N" in names:
        names[names.index("N")] = "B"
    return "".join(names) + "H"


def count_heads(x: Tensor, axes: str) -> int:
    """Return the number of heads that (B, S, N*H) packs; 0 for the form (B, N, S, H)."""
    if not _is_packed(axes):
        return 0
    return int(x.shape[axes.index("N")]) if "N" in axes else 1


def to_op(x: Tensor, axes: str) -> Tensor:
    """Bring X into the form (B, N, S, H), or (B, S, N*H) where heads come after the sequence."""
    order = _find_order(axes)
    if order != sorted(order):
        x = x.permute(order)
    if "B" not in axes:
        x = x[None]
    heads, rows = axes.count("N"), axes.count("S")
    if _is_packed(axes):
        x = x.flatten(1, rows) if rows > 1 else x
        return x.flatten(2) if heads else x
    x = x.flatten(1 + heads, heads + rows) if rows > 1 else x
    return x.flatten(1, heads) if heads > 1 else x


def from_op(y: Tensor, x: Tensor, axes: str) -> Tensor:
    """Undo `to_op`; the number of channels may differ from that of x."""
    order = _find_order(axes)
    heads = [x.shape[axis] for axis in order if axes[axis] == "N"]
    rows = [x.shape[axis] for axis in order if axes[axis] == "S"]
    if _is_packed(axes):
        if heads:
            y = y.unflatten(2, (int(heads[0]), -1))
        y = _split(y, 1, rows)
    else:
        y = _split(_split(y, 2, rows), 1, heads)
    if "B" not in axes:
        y = y[0]
    if order != sorted(order):
        y = y.permute(sorted(range(len(order)), key=order.__getitem__))
    return y


def flatten_table(table: Tensor, axes: str) -> Tensor:
    """Bring what is one number a channel, with one head, into the form (B or 1, S, channels)."""
    for axis in reversed(range(len(axes))):
        if axes[axis] == "N":
            table = table.select(axis, 0)
    left = axes.replace("N", "")
    order = sorted(range(len(left)), key=lambda axis: "BSH".index(left[axis]))
    if order != sorted(order):
        table = table.permute(order)
    if "B" not in left:
        table = table[None]
    return table.flatten(1, -2) if left.count("S") > 1 else table


def _is_packed(axes: str) -> bool:
    """Return whether X has the form (B, S, N*H): one or no dimension of heads, after the rows."""
    return axes.count("N") == 0 or (axes.count("N") == 1 and axes.index("N") > axes.rindex("S"))


def _find_order(axes: str) -> list[int]:
    """Return the order of dimensions that the op has."""
    names = "BSNH" if _is_packed(axes) else "BNSH"
    return sorted(range(len(axes)), key=lambda axis: names.index(axes[axis]))


def _split(y: Tensor, axis: int, sizes: Sequence[Any]) -> Tensor:
    """Undo the flattening of several dimensions."""
    if len(sizes) < 2:
        return y
    return y.reshape(*y.shape[:axis], *sizes, *y.shape[axis + 1 :])
