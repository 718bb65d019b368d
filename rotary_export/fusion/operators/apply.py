"""Rewrite attention and norms in ONNX's own operators."""

from __future__ import annotations

import onnx_ir.passes.common as passes
from onnxscript import ir
from onnxscript.rewriter import pattern

from rotary_export.compat.onnx_rewriter import list_norm_rules
from rotary_export.fusion.operators.attention import GrowingCacheRule, RepeatedHeadsRule
from rotary_export.fusion.operators.reshapes import SameShapeRule

MINIMUM_OPSET = 23  # of Attention and RMSNormalization


def write_operators(model: ir.Model) -> dict[str, int]:
    """Rewrite a graph in place; one of an older opset stays as it is.

    Args:
        model: With known shapes.

    Returns:
        How many nodes were rewritten, by what was done.
    """
    if model.graph.opset_imports.get("", 0) < MINIMUM_OPSET:
        return {}
    steps = {
        "norms as one node": list_norm_rules(),
        "reshapes left out": (SameShapeRule.rule(),),
        "attentions with groups of heads": (RepeatedHeadsRule.rule(),),
        "attentions that read the cache": (GrowingCacheRule.rule(),),  # behind the groups
    }
    counts = {}
    for name, rules in steps.items():
        counts[name] = pattern.RewriteRuleSet(rules, commute=False).apply_to_model(model)
        passes.IdentityEliminationPass()(model)
        passes.TopologicalSortPass()(model)
        passes.RemoveUnusedNodesPass()(model)
    return counts
