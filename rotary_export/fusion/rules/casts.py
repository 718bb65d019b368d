"""Around our node: half-precision x is widened, rotated and rounded, as the op itself does."""

from __future__ import annotations

from typing import Any

from onnxscript import ir

from rotary_export.fusion.rules.base import Op, Result, Rule, read_rotary_attributes
from rotary_export.fusion.rules.build import HALF_TYPES, copy_type, write_rotary
from rotary_export.op import spec


class CastRule(Rule):
    """Removes the casts."""

    def pattern(self, op: Op, x: Any, to: Any) -> Any:
        wide = op.Cast(x, _outputs=["wide"])
        y = op.RotaryEmbedding(wide, _allow_other_inputs=True, _domain=spec.DOMAIN, _outputs=["y"])
        return op.Cast(y, _outputs=["out"])

    def check(
        self, context: Any, out: ir.Value, y: ir.Value, wide: ir.Value, x: ir.Value, **_: Any
    ) -> Result:
        if wide.dtype != ir.DataType.FLOAT or x.dtype not in HALF_TYPES or out.dtype != x.dtype:
            return self.pass_by(out, "the casts are not from half precision to float32 and back")
        was = self.findings.fused.pop(y.name or "", "rotary node")
        return self.accept(out, f"{was}, casts removed")

    def rewrite(self, op: Op, x: ir.Value, y: ir.Value, **_: Any) -> ir.Value:
        node = y.producer()
        assert node is not None
        inputs = [x, *node.inputs[1:]]
        return copy_type(write_rotary(op, inputs, read_rotary_attributes(node)), x)
