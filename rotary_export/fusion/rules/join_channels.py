"""Parts of the result are joined to channels.

1. Concat of the two halves: (a cos - b sin, b cos + a sin).
2. Concat of the rotated channels and the others.
3. A Concat of one of these with something else is the whole only if it is a rotation itself.
"""

from __future__ import annotations

from typing import Any

from onnxscript import ir

from rotary_export.fusion.rules.base import Op, Result
from rotary_export.fusion.rules.build import Plan, plan_rotation
from rotary_export.fusion.rules.primitives import PrimitiveRule, is_near_products
from rotary_export.fusion.values import joins_channels


class ConcatRule(PrimitiveRule):
    """All cases."""

    def pattern(self, op: Op) -> Any:
        return op.Concat(_allow_other_inputs=True, _outputs=["out"])

    def check(self, context: Any, out: ir.Value, **_: Any) -> Result:
        node = out.producer()
        assert node is not None
        if not joins_channels(node) or not is_near_products(out):
            return self.pass_by(out, "it does not join parts of a rotation")
        for user in out.consumers():  # case 3
            if joins_channels(user) and isinstance(plan_rotation(user.outputs[0]), Plan):
                return self.pass_by(out, "it is a part of a rotation")
        return self.examine(out)
