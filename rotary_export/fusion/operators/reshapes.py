"""Reshapes that change nothing, as torch.onnx writes one behind each attention."""

from __future__ import annotations

from typing import Any

from onnxscript import ir
from onnxscript.rewriter import pattern

from rotary_export.fusion.rules.base import Op, Result
from rotary_export.fusion.values import read_dims


class SameShapeRule(pattern.RewriteRuleClassBase):
    """A reshape to the shape that the tensor has already: all sizes are known or have names."""

    def pattern(self, op: Op, x: Any, shape: Any) -> Any:
        return op.Reshape(x, shape, _outputs=["y"])

    def check(self, context: Any, x: ir.Value, y: ir.Value, **_: Any) -> Result:
        before, after = read_dims(x), read_dims(y)
        if before is None or after is None or None in before or before != after:
            return pattern.MatchResult().fail("the shape changes", y)
        return pattern.MatchResult()

    def rewrite(self, op: Op, x: ir.Value, **_: Any) -> ir.Value:
        value: ir.Value = op.Identity(x)
        return value
