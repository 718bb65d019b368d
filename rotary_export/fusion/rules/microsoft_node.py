"""`com.microsoft::RotaryEmbedding`: inputs X, position_ids, cos, sin.

Inputs are reordered; `scale` is ignored and heads are inferred from the tables, as in ONNX Runtime:

1. X is (B, N, S, H): the tables must be for all H channels, or for rotary_embedding_dim of them.
2. X is (B, S, N*H) and rotary_embedding_dim is set: num_heads is required.
3. X is (B, S, N*H) without it: a head is as wide as the tables.
"""

from __future__ import annotations

from typing import Any

from onnxscript import ir

from rotary_export.fusion.rules.base import Op, Result, Rule
from rotary_export.fusion.rules.build import X_TYPES, widen, write_rotary
from rotary_export.fusion.values import Dims, read_dims, read_int_attribute

DOMAIN = "com.microsoft"


class MicrosoftRule(Rule):
    """All cases."""

    attributes: dict[str, int]

    def pattern(self, op: Op, x: Any, ids: Any, cos: Any, sin: Any) -> Any:
        return op.RotaryEmbedding(x, ids, cos, sin, _domain=DOMAIN, _outputs=["y"])

    def check(
        self, context: Any, y: ir.Value, x: ir.Value, ids: ir.Value, cos: ir.Value, sin: ir.Value
    ) -> Result:
        node = y.producer()
        assert node is not None
        dims, cos_dims, id_dims = read_dims(x), read_dims(cos), read_dims(ids)
        if dims is None or not isinstance(dims[-1], int) or id_dims is None:
            return self.refuse(y, "the shapes of X and position_ids are not known")
        if cos_dims is None or len(cos_dims) != 2 or not isinstance(cos_dims[1], int):
            return self.refuse(y, f"the tables must be (max_seq_len, width), got {cos_dims}")
        if x.dtype not in X_TYPES:
            return self.refuse(y, f"X is {x.dtype}")
        sizes = _find_sizes(node, dims, dims[-1], 2 * cos_dims[1])
        if isinstance(sizes, str):
            return self.refuse(y, sizes)
        heads, rotary_dim = sizes
        self.attributes = {
            "interleaved": read_int_attribute(node, "interleaved"),
            "rotary_embedding_dim": rotary_dim,
            "num_heads": heads if len(dims) == 3 else 0,
        }
        return self.accept(y, f"{DOMAIN}::RotaryEmbedding")

    def rewrite(
        self, op: Op, x: ir.Value, ids: ir.Value, cos: ir.Value, sin: ir.Value, **_: Any
    ) -> ir.Value:
        return write_rotary(op, [x, widen(op, cos), widen(op, sin), ids], self.attributes)


def _find_sizes(node: ir.Node, dims: Dims, channels: int, width: int) -> tuple[int, int] | str:
    """Find num_heads and rotary_embedding_dim.

    Args:
        node: Microsoft's.
        dims: Of X.
        channels: Its last size.
        width: Channels that the tables are for.

    Returns:
        Both; or why they don't fit.
    """
    heads = read_int_attribute(node, "num_heads")
    rotary_dim = read_int_attribute(node, "rotary_embedding_dim")
    if rotary_dim and rotary_dim != width:
        return f"rotary_embedding_dim is {rotary_dim}, the tables are for {width}"
    if len(dims) == 4:  # case 1
        head_dim = channels
    elif rotary_dim:  # case 2
        if not heads:
            return "rotary_embedding_dim requires num_heads"
        head_dim = channels // heads
    else:  # case 3
        head_dim = width
        if channels % width or heads not in (0, channels // width):
            return f"{heads} heads of {width} channels do not fill the {channels} of X"
        heads = channels // width
    if width > head_dim or (width < head_dim and not rotary_dim):
        return f"tables for {width} channels, heads of {head_dim}"
    return heads, rotary_dim
