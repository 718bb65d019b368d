"""Write the fused node: half-width float32 tables of (B or 1, S, R/2), shared by all layers, and X.

The op requires X as (B, N, S, H) or (B, S, N*H). What models rotate, by the axes before the
channels:

    BNSH  (B, N, S, H), tables with an axis of 1 for the heads: as it is
    BSNH  (B, S, N, H): seen as (B, S, N*H)
    SNH   (S, N, H), no batch (vision): seen as (1, S, N*H)
    BSH   (B, S, H), one head: as it is, num_heads = 1
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from onnxscript import ir

from rotary_export.fusion.rules.base import Op
from rotary_export.fusion.symbolic.refusal import NotARotationError, Refusal, make_refusal
from rotary_export.fusion.symbolic.rotation import Rotation, Table, find_rotation
from rotary_export.fusion.values import Dims, read_dims
from rotary_export.op import spec

HALF_TYPES = {ir.DataType.FLOAT16, ir.DataType.BFLOAT16}
X_TYPES = {*HALF_TYPES, ir.DataType.FLOAT, ir.DataType.DOUBLE}
_LAYOUTS = {3: ("BNS", "BSN"), 2: ("SN", "BS")}
_VIEWS = {"Unsqueeze", "Squeeze", "Slice", "Reshape", "Transpose", "Expand", "Identity"}


@dataclass(frozen=True)
class Plan:
    """How a rotation becomes a node.

    Attributes:
        rotation: What was found.
        layout: The axes of x before its channels, one letter each.
        heads: N of a "BSN" or "SN" layout.
    """

    rotation: Rotation
    layout: str
    heads: int


def plan_rotation(out: ir.Value) -> Plan | Refusal:
    """Find out of what a value is the rotation, and how that becomes a node."""
    found = find_rotation(out)
    if isinstance(found, Refusal):
        return found
    try:
        return make_plan(found)
    except NotARotationError as error:
        return make_refusal(error)


def make_plan(rotation: Rotation) -> Plan:
    """Match the axes of x with those of the tables.

    Raises:
        NotARotationError: The op can't express it; with the reason.
    """
    x, channels = rotation.x, rotation.channels
    dims = read_dims(x)
    assert dims is not None
    if x.dtype not in X_TYPES:
        raise NotARotationError(f"x is {x.dtype}", channels)
    leading = dims[:-1]
    if len(leading) not in _LAYOUTS:
        raise NotARotationError(f"x has {len(dims)} axes, the op accepts 3 or 4", channels)
    shapes = [_read_leading(table, len(leading)) for table in (rotation.cos, rotation.sin)]
    for layout in _LAYOUTS[len(leading)]:
        if all(_fits(layout, shape, leading) for shape in shapes):
            break
    else:
        raise NotARotationError(
            f"the tables are not broadcast over the heads: x has {leading} before its channels, "
            f"the tables {shapes[0]} and {shapes[1]}",
            channels,
        )
    heads = 1
    if layout in ("BSN", "SN"):
        size = leading[layout.index("N")]
        if not isinstance(size, int):
            raise NotARotationError("the number of heads is not static", channels)
        heads = size
    return Plan(rotation, layout, heads)


def _read_leading(table: Table, rank: int) -> Dims:
    """Return the sizes of a table's axes before the channels, aligned with those of x."""
    dims = read_dims(table.value)
    assert dims is not None
    own = dims[: len(dims) - table.rank]
    return [1] * (rank - len(own)) + own


def _fits(layout: str, table: Dims, x: Dims) -> bool:
    """Return whether a table is one of (B or 1, S, R/2) for X in this layout."""
    for axis, own, other in zip(layout, table, x, strict=True):
        if axis == "N" and own != 1:
            return False
        if axis == "S" and own == 1 and other != 1:
            return False
        if axis == "B" and isinstance(own, int) and own not in (1, other):
            return False
    return True


def write_node(op: Op, plan: Plan, shared: dict[Any, ir.Value]) -> ir.Value:
    """Write the nodes that replace a rotation.

    Args:
        op: The rewriter's builder.
        plan: What to write.
        shared: Tables that were written before, by what they are; new ones are added.

    Returns:
        The value that replaces `rotation.out`.
    """
    found = plan.rotation
    tables = [_write_table(op, table, plan, shared) for table in (found.cos, found.sin)]
    dims = read_dims(found.x)
    assert dims is not None
    head_dim = dims[-1]
    assert isinstance(head_dim, int)
    attributes = {"interleaved": int(found.interleaved)}
    if found.rotary_dim < head_dim:
        attributes["rotary_embedding_dim"] = found.rotary_dim
    x = found.x
    flat: Dims | None = None
    if plan.layout == "BSN":
        flat = [dims[0], dims[1], plan.heads * head_dim]
        x = _reshape(op, x, [0, 0, plan.heads * head_dim], flat)
    elif plan.layout == "SN":
        flat = [1, dims[0], plan.heads * head_dim]
        x = _reshape(op, x, [1, -1, plan.heads * head_dim], flat)
    if plan.layout != "BNS":
        attributes["num_heads"] = plan.heads
    y = write_rotary(op, [x, *tables], attributes)
    if flat is not None:
        back = [0, 0] if plan.layout == "BSN" else [-1]
        y = _reshape(op, y, [*back, plan.heads, head_dim], dims)
    order = found.layout.order
    if order is not None:
        y = copy_type(op.Gather(y, op.Constant(value_ints=order), axis=-1), y)
    return y


def write_rotary(
    op: Op, inputs: Sequence[ir.Value | None], attributes: Mapping[str, int]
) -> ir.Value:
    """Write one node of our op; attributes that are 0 are left out.

    Returns:
        Its output, with the type and shape of X.
    """
    used = {name: value for name, value in attributes.items() if value}
    y: ir.Value = op.op(
        spec.OP_TYPE, *inputs, _domain=spec.DOMAIN, _version=spec.OP_VERSION, **used
    )
    assert inputs[0] is not None
    return copy_type(y, inputs[0])


def copy_type(value: ir.Value, other: ir.Value) -> ir.Value:
    """Set a value's type and shape to another's, and return it."""
    value.type, value.shape = other.type, other.shape
    return value


def _typed(value: ir.Value, dtype: ir.DataType | None, dims: Dims) -> ir.Value:
    value.shape = ir.Shape(dims)
    value.type = ir.TensorType(dtype) if dtype is not None else None
    return value


def _reshape(op: Op, x: ir.Value, shape: list[int], dims: Dims) -> ir.Value:
    return _typed(op.Reshape(x, op.Constant(value_ints=shape)), x.dtype, dims)


def _write_table(op: Op, table: Table, plan: Plan, shared: dict[Any, ir.Value]) -> ir.Value:
    """Write half-width channels of a table's value, in (B or 1, S, R/2)."""
    dims = read_dims(table.value)
    assert dims is not None
    leading = dims[: len(dims) - table.rank]
    axes = plan.layout[len(plan.layout) - len(leading) :]
    key = (table, axes, table.value.graph)
    if key in shared:
        return shared[key]
    value = widen(op, table.value)
    value, dims = _select_channels(op, value, dims, table)
    if "N" in axes:
        axis = axes.index("N")
        del dims[axis]
        value = _typed(op.Squeeze(value, op.Constant(value_ints=[axis])), value.dtype, dims)
    if "B" not in axes:
        dims = [1, *dims]
        value = _typed(op.Unsqueeze(value, op.Constant(value_ints=[0])), value.dtype, dims)
    if table.factor != 1.0:
        assert value.dtype is not None
        number = np.array(table.factor, value.dtype.numpy())
        value = _typed(op.Mul(value, op.Constant(value=ir.tensor(number))), value.dtype, dims)
    shared[key] = value
    return value


def _select_channels(op: Op, value: ir.Value, dims: Dims, table: Table) -> tuple[ir.Value, Dims]:
    """Write what selects the wanted channels, along one last axis."""
    leading, shape = dims[: len(dims) - table.rank], dims[len(dims) - table.rank :]
    size = int(np.prod([d for d in shape if isinstance(d, int)], initial=1))
    if table.rank != 1:
        dims = [*leading, size]
        zeros = [0] * len(leading)
        value = _reshape(op, value, [*zeros, size], dims)
    picked, half = list(table.channels), len(table.channels)
    if picked == list(range(size)):
        return value, list(dims)
    dims = [*leading, half]
    step = picked[1] - picked[0] if half > 1 else 1
    if step > 0 and picked == list(range(picked[0], picked[0] + step * half, step)):
        bounds = ([picked[0]], [picked[-1] + 1], [-1], [step])
        cut = op.Slice(value, *(op.Constant(value_ints=bound) for bound in bounds))
        return _typed(cut, value.dtype, dims), dims
    gathered = op.Gather(value, op.Constant(value_ints=picked), axis=-1)
    return _typed(gathered, value.dtype, dims), dims


def widen(op: Op, value: ir.Value) -> ir.Value:
    """Return a half-precision table as it was before it was rounded, where that exists."""
    wide = _widen(op, value) if value.dtype in HALF_TYPES else None
    return value if wide is None else wide


def _widen(op: Op, value: ir.Value) -> ir.Value | None:
    node = value.producer()
    if node is None or node.domain:
        return None
    data = node.inputs[0] if node.inputs else None
    if data is None:
        return None
    if node.op_type == "Cast":
        return data if data.dtype == ir.DataType.FLOAT else None
    if node.op_type not in _VIEWS:
        return None
    wide = _widen(op, data)
    if wide is None:
        return None
    attributes = {name: attribute for name, attribute in node.attributes.items()}
    again: ir.Value = op.op(node.op_type, wide, *node.inputs[1:], **attributes)
    again.shape, again.type = value.shape, wide.type
    return again
