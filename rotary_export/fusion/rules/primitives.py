"""What the rules for primitives share: a value that is shown to be a rotation becomes our node."""

from __future__ import annotations

from typing import Any

from onnxscript import ir

from rotary_export.fusion.rules.base import Op, Result, Rule
from rotary_export.fusion.rules.build import Plan, plan_rotation, write_node
from rotary_export.fusion.symbolic.refusal import Refusal
from rotary_export.fusion.values import is_sum_of_products, read_dims

_MOVES = {"Concat", "Gather", "Reshape", "Unsqueeze", "Cast", "Identity", "Squeeze", "Flatten"}
_MAX_MOVES = 5


class PrimitiveRule(Rule):
    """Its pattern chooses a value, `examine` decides."""

    plan: Plan

    def examine(self, out: ir.Value) -> Result:
        plan = plan_rotation(out)
        if isinstance(plan, Refusal):
            return self.keep(out, plan)
        self.plan = plan
        found = plan.rotation
        words = ["interleaved" if found.interleaved else "half"]
        dims = read_dims(found.x)
        if dims is not None and found.rotary_dim != dims[-1]:
            words.append(f"partial {found.rotary_dim} of {dims[-1]}")
        if found.layout.order is not None:
            words.append("halves out")
        return self.accept(out, f"primitives, {', '.join(words)}")

    def rewrite(self, op: Op, **_: Any) -> ir.Value:
        return write_node(op, self.plan, self.findings.shared)


def is_near_products(value: ir.Value, depth: int = _MAX_MOVES) -> bool:
    """Return whether a sum of two products is a few moves of channels above."""
    node = value.producer()
    if node is None or node.domain or not depth:
        return False
    if is_sum_of_products(node):
        return True
    return node.op_type in _MOVES and any(
        v is not None and is_near_products(v, depth - 1) for v in node.inputs
    )
