"""Rewrite attention and norms in ONNX's own operators."""

from __future__ import annotations

import onnx_ir.passes.common as passes
from onnxscript import ir
from onnxscript.rewriter import pattern

from rotary_export.compat.onnx_rewriter import list_norm_rules
from rotary_export.fusion.operators.attention import GrowingCacheRule, RepeatedHeadsRule
from rotary_export.fusion.operators.reshapes import SameShapeRule

MINIMUM_OPSET = 23  # of Attention and RMSNormalization


def write_operators(model: ir.Model) -> None:
    """Rewrite a graph in place; one of an older opset stays as it is.

    Args:
        model: With known shapes.
    """
    if model.graph.opset_imports.get("", 0) < MINIMUM_OPSET:
        return
    steps = (
        (*list_norm_rules(), SameShapeRule.rule()),
        (RepeatedHeadsRule.rule(),),  # before the cache is looked for behind them
        (GrowingCacheRule.rule(),),
    )
    for step in steps:
        pattern.RewriteRuleSet(step, commute=False).apply_to_model(model)
        passes.IdentityEliminationPass()(model)
        passes.TopologicalSortPass()(model)
        passes.RemoveUnusedNodesPass()(model)
