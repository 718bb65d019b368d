"""Normalise any exporter's graph to the form that the rules read: flat, folded, known shapes.

torch's TorchScript exporter, and with it optimum, writes no shapes and computes every size at run
time; its newer exporter writes both.
"""

from __future__ import annotations

from typing import Any

import onnx_ir.passes.common as passes
from onnxscript import ir, optimizer
from onnxscript.rewriter import pattern

from rotary_export.fusion.rules.base import Op, Result
from rotary_export.fusion.symbolic.shapes import clear_generated_dims, fill_shapes
from rotary_export.fusion.values import (
    read_constant,
    read_dims,
    read_int_attribute,
    read_ints,
)
from rotary_export.op import spec

_MAX_STEPS = 8
_OURS = (spec.DOMAIN, spec.OP_TYPE)


class SizeRule(pattern.RewriteRuleClassBase):
    """One static size of a shape becomes a constant: halves are cut at size / 2."""

    def __init__(self) -> None:
        super().__init__(remove_nodes=False)

    def pattern(self, op: Op, x: Any, index: Any) -> Any:
        return op.Gather(op.Shape(x, _outputs=["shape"]), index, _outputs=["size"])

    def check(
        self, context: Any, x: ir.Value, shape: ir.Value, index: ir.Value, size: ir.Value
    ) -> Result:
        dims, at, node = read_dims(x), read_constant(index), shape.producer()
        if dims is None or at is None or at.ndim or node is None:
            return pattern.MatchResult().fail("not one size of a shape", size)
        start, end = read_int_attribute(node, "start"), read_int_attribute(node, "end", len(dims))
        sizes = dims[start:end]
        if not -len(sizes) <= int(at) < len(sizes):
            return pattern.MatchResult().fail("the shape has no such size", index)
        self.size = sizes[int(at)]
        if not isinstance(self.size, int):
            return pattern.MatchResult().fail("the size is not static", x)
        return pattern.MatchResult()

    def rewrite(self, op: Op, **_: Any) -> ir.Value:
        value: ir.Value = op.Constant(value_int=self.size)
        return value


class RepeatRule(pattern.RewriteRuleClassBase):
    """Channels that torch's old exporter repeats although their number is unknown.

    It brings them to the front, repeats them along a new axis, picks with GatherND and moves them
    back. Once their number is known, that is one Gather.
    """

    def __init__(self) -> None:
        super().__init__(remove_nodes=False)

    def pattern(self, op: Op, front: Any, axes: Any, shape: Any, picked: Any) -> Any:
        wide = op.Expand(op.Unsqueeze(front, axes), shape, _outputs=["wide"])
        return op.Transpose(op.GatherND(wide, picked, _outputs=["rows"]), _outputs=["back"])

    def check(
        self,
        context: Any,
        front: ir.Value,
        axes: ir.Value,
        wide: ir.Value,
        picked: ir.Value,
        rows: ir.Value,
        back: ir.Value,
        **_: Any,
    ) -> Result:
        dims, sizes, indices = read_dims(front), read_dims(wide), read_constant(picked)
        gather, transpose = rows.producer(), back.producer()
        assert gather is not None
        assert transpose is not None
        if dims is None or sizes is None or indices is None:
            return pattern.MatchResult().fail("a size is not known", wide)
        batch, perm = read_int_attribute(gather, "batch_dims"), transpose.attributes.get("perm")
        is_pair = indices.ndim == 2 and indices.shape[1] == 2 and not batch
        is_same = None not in dims and [*sizes[:1], *sizes[2:]] == dims
        if read_ints(axes) != [1] or not is_pair or not is_same:
            return pattern.MatchResult().fail("more than one axis is repeated", wide)
        if perm is None or perm.as_ints()[-1] != 0:
            return pattern.MatchResult().fail("it is not the channels that are repeated", back)
        self.perm = list(perm.as_ints())
        self.channels = [int(i) for i in indices[:, 0]]
        return pattern.MatchResult()

    def rewrite(self, op: Op, front: ir.Value, **_: Any) -> ir.Value:
        moved = op.Transpose(front, perm=self.perm)
        value: ir.Value = op.Gather(moved, op.Constant(value_ints=self.channels), axis=-1)
        return value


class ScatterRule(pattern.RewriteRuleClassBase):
    """Channels that are assigned to slices, as torch's newer exporter writes it.

    It brings the channels to the front, writes rows with ScatterND and moves them back. Once the
    rows are known, that is one Gather of the old channels and the new ones.
    """

    def __init__(self) -> None:
        super().__init__(remove_nodes=False)

    def pattern(self, op: Op, data: Any, rows: Any, new: Any) -> Any:
        front = op.Transpose(data, _outputs=["front"])
        update = op.Transpose(new, _outputs=["update"])
        return op.Transpose(op.ScatterND(front, rows, update, _outputs=["mixed"]), _outputs=["out"])

    def check(
        self,
        context: Any,
        data: ir.Value,
        rows: ir.Value,
        front: ir.Value,
        update: ir.Value,
        mixed: ir.Value,
        out: ir.Value,
        **_: Any,
    ) -> Result:
        dims, indices, scatter = read_dims(data), read_constant(rows), mixed.producer()
        assert scatter is not None
        if dims is None or not isinstance(dims[-1], int) or indices is None or indices.ndim != 2:
            return pattern.MatchResult().fail("the rows are not known", rows)
        perms = [
            list(node.attributes["perm"].as_ints())
            for value in (front, update, out)
            if (node := value.producer()) is not None and "perm" in node.attributes
        ]
        moves_back = len(perms) == 3 and [perms[0][axis] for axis in perms[2]] == [
            *range(len(dims))
        ]
        if not moves_back or perms[0] != perms[1] or perms[0][0] != len(dims) - 1:
            return pattern.MatchResult().fail("it is not the channels that are assigned", out)
        reduction = scatter.attributes.get("reduction")
        if indices.shape[1] != 1 or (reduction is not None and reduction.as_string() != "none"):
            return pattern.MatchResult().fail("it assigns no whole channels", mixed)
        self.channels = [*range(dims[-1])]
        for row, index in enumerate(indices[:, 0]):
            self.channels[int(index)] = dims[-1] + row
        return pattern.MatchResult()

    def rewrite(self, op: Op, data: ir.Value, new: ir.Value, **_: Any) -> ir.Value:
        both = op.Concat(data, new, axis=-1)
        value: ir.Value = op.Gather(both, op.Constant(value_ints=self.channels), axis=-1)
        return value


def _is_short_filling(node: ir.Node) -> bool | None:
    """Fold what onnxscript would keep: a vector of a few equal numbers is part of a shape."""
    if node.op_type != "ConstantOfShape" or node.domain:
        return None
    dims = read_dims(node.outputs[0])
    is_short = dims is not None and len(dims) == 1 and isinstance(dims[0], int) and dims[0] <= 512
    return True if is_short else None


def inline_functions(model: ir.Model) -> dict[Any, ir.Function]:
    """Inline all functions but those of our node, which stays a node; in place.

    Returns:
        Those of our node, which are taken out.
    """
    own = {key: model.functions.pop(key) for key in list(model.functions) if key[:2] == _OURS}
    if model.functions:
        passes.InlinePass()(model)
    return own


def infer_types(model: ir.Model) -> None:
    """Infer types and shapes, in place."""
    passes.ShapeInferencePass(check_type=False, strict_mode=False)(model)


def normalize(model: ir.Model) -> None:
    """Inline functions, infer shapes, fold constants, share what is computed twice; in place."""
    inline_functions(model)
    for step in range(_MAX_STEPS):  # sizes fold into constants, which make more sizes known
        clear_generated_dims(model)
        infer_types(model)
        changed = fill_shapes(model)
        for rule in (SizeRule, RepeatRule, ScatterRule):
            changed |= rule.rule().apply_to_model(model) > 0
        optimizer.fold_constants(model, onnx_shape_inference=True, should_fold=_is_short_filling)
        if step and not changed:
            break
    passes.RemoveUnusedNodesPass()(model)
    passes.CommonSubexpressionEliminationPass()(model)
    passes.NameFixPass()(model)
