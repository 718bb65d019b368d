"""The sum, or the difference, of two products.

1. x * cos + rotate_half(x) * sin: `SumRule`.
2. x * cos - turn(x) * sin, where turn(x) is (b, -a) for the halves (a, b): `DifferenceRule`.

However the halves are cut and joined: the pattern is only the last three nodes.
"""

from __future__ import annotations

from typing import Any

from onnxscript import ir

from rotary_export.fusion.rules.base import Op, Result
from rotary_export.fusion.rules.primitives import PrimitiveRule


class SumRule(PrimitiveRule):
    """Case 1."""

    def pattern(self, op: Op, a: Any, b: Any, c: Any, d: Any) -> Any:
        return op.Add(op.Mul(a, b), op.Mul(c, d), _outputs=["out"])

    def check(self, context: Any, out: ir.Value, **_: Any) -> Result:
        return self.examine(out)


class DifferenceRule(SumRule):
    """Case 2."""

    def pattern(self, op: Op, a: Any, b: Any, c: Any, d: Any) -> Any:
        return op.Sub(op.Mul(a, b), op.Mul(c, d), _outputs=["out"])
