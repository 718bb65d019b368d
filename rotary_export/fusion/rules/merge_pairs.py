"""Members of pairs, rotated apart, are merged into the channels.

1. Reshape of (..., R/2, 2) to (..., R): even and odd channels were rotated apart, then stacked.
2. The same of real and imaginary parts: a complex product.
3. Gather by constant indices: even and odd channels were assigned to slices of a tensor.
"""

from __future__ import annotations

from typing import Any

from onnxscript import ir

from rotary_export.fusion.rules.base import Op, Result
from rotary_export.fusion.rules.primitives import PrimitiveRule, is_near_products
from rotary_export.fusion.values import read_constant


class ReshapeRule(PrimitiveRule):
    """Cases 1 and 2."""

    def pattern(self, op: Op, data: Any, shape: Any) -> Any:
        return op.Reshape(data, shape, _outputs=["out"])

    def check(self, context: Any, out: ir.Value, **_: Any) -> Result:
        if not is_near_products(out):
            return self.pass_by(out, "it does not merge parts of a rotation")
        return self.examine(out)


class GatherRule(PrimitiveRule):
    """Case 3."""

    def pattern(self, op: Op, data: Any, indices: Any) -> Any:
        return op.Gather(data, indices, _outputs=["out"])

    def check(self, context: Any, out: ir.Value, indices: ir.Value, **_: Any) -> Result:
        if read_constant(indices) is None or not is_near_products(out):
            return self.pass_by(out, "it does not merge parts of a rotation")
        return self.examine(out)
