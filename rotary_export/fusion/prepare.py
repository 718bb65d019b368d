"""Bring any exporter's graph into the form that the rules read: flat, folded, with known shapes.

The TorchScript exporter, and with it optimum, writes no shapes and computes every size at run time;
torch's newer one writes both.
"""

from __future__ import annotations

import math
from typing import Any

import onnx_ir.passes.common as passes
from onnxscript import ir, optimizer
from onnxscript.rewriter import pattern

from rotary_export.fusion.sums import read_constant, read_dims
from rotary_export.op import spec

Op = Any
Result = Any


class SizeRule(pattern.RewriteRuleClassBase):
    """One static size of a shape is a constant; halves are cut at size / 2."""

    def __init__(self) -> None:
        super().__init__(remove_nodes=False)

    def pattern(self, op: Op, x: Any, index: Any) -> Any:
        return op.Gather(op.Shape(x, _outputs=["shape"]), index, _outputs=["size"])

    def check(
        self, context: Any, x: ir.Value, shape: ir.Value, index: ir.Value, size: ir.Value
    ) -> Result:
        dims, at, node = read_dims(x), read_constant(index), shape.producer()
        if dims is None or at is None or at.ndim or node is None or node.attributes:
            return pattern.MatchResult().fail("not one size of a shape", size)
        self.size = dims[int(at)]
        if not isinstance(self.size, int):
            return pattern.MatchResult().fail("the size is not static", x)
        return pattern.MatchResult()

    def rewrite(self, op: Op, **_: Any) -> ir.Value:
        value: ir.Value = op.Constant(value_int=self.size)
        return value


def prepare(model: ir.Model) -> None:
    """Inline functions, infer shapes, fold constants, share what is computed twice; in place."""
    for identifier in list(model.functions):
        if identifier[:2] == (spec.DOMAIN, spec.OP_TYPE):
            del model.functions[identifier]  # a node of ours stays a node
    if model.functions:
        passes.InlinePass()(model)
    for _ in range(2):  # sizes that are known fold into constants, which make more sizes known
        passes.ShapeInferencePass(check_type=False, strict_mode=False)(model)
        fill_reshapes(model)
        SizeRule.rule().apply_to_model(model)
        optimizer.fold_constants(model, onnx_shape_inference=True)
    passes.RemoveUnusedNodesPass()(model)
    passes.CommonSubexpressionEliminationPass()(model)
    passes.NameFixPass()(model)


def fill_reshapes(model: ir.Model) -> None:
    """Work out the one unknown size of a Reshape: (B, S, 8, 2) to (B, S, ?) makes 16."""
    for node in model.graph.all_nodes():
        if node.op_type != "Reshape" or node.domain or node.inputs[0] is None:
            continue
        before, after = read_dims(node.inputs[0]), read_dims(node.outputs[0])
        if before is None or after is None:
            continue
        names = [d for d in before if not isinstance(d, int)]
        unknown = []
        for axis, dim in enumerate(after):
            if isinstance(dim, int):
                continue
            if dim is not None and dim in names:
                names.remove(dim)
            else:
                unknown.append(axis)
        known = math.prod(d for d in after if isinstance(d, int))
        if names or len(unknown) != 1 or not known:
            continue
        after[unknown[0]] = math.prod(d for d in before if isinstance(d, int)) // known
        node.outputs[0].shape = ir.Shape(after)
