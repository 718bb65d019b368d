"""`ai.onnx::RotaryEmbedding`: our op is a superset, so only the domain changes.

Tables of batch 1, as torch's exporter writes them, then run at every batch.
"""

from __future__ import annotations

from typing import Any

from onnxscript import ir

from rotary_export.fusion.rules.base import Op, Result, Rule, read_rotary_attributes
from rotary_export.fusion.rules.build import X_TYPES, widen, write_rotary
from rotary_export.fusion.values import read_dims


class OnnxRule(Rule):
    """3-D and 4-D X."""

    def pattern(self, op: Op, x: Any, cos: Any, sin: Any) -> Any:
        return op.RotaryEmbedding(x, cos, sin, _allow_other_inputs=True, _outputs=["y"])

    def check(self, context: Any, y: ir.Value, x: ir.Value, cos: ir.Value, sin: ir.Value) -> Result:
        dims = read_dims(x)
        if dims is None or not isinstance(dims[-1], int):
            return self.refuse(y, "the shape of X is not known")
        if x.dtype not in X_TYPES:
            return self.refuse(y, f"X is {x.dtype}")
        return self.accept(y, "ai.onnx::RotaryEmbedding")

    def rewrite(self, op: Op, y: ir.Value, **_: Any) -> ir.Value:
        node = y.producer()
        assert node is not None
        attributes = read_rotary_attributes(node)
        dims = read_dims(node.inputs[0])
        if dims is None or len(dims) != 3:
            attributes.pop("num_heads")
        x, cos, sin, *ids = node.inputs
        assert cos is not None
        assert sin is not None
        return write_rotary(op, [x, widen(op, cos), widen(op, sin), *ids], attributes)
