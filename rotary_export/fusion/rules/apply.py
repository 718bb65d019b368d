"""The rules and passes, in the order in which they are applied."""

from __future__ import annotations

import onnx_ir.passes.common as passes
from onnxscript import ir
from onnxscript.rewriter import pattern

from rotary_export.fusion.rules.add_products import DifferenceRule, SumRule
from rotary_export.fusion.rules.base import Findings, Rule
from rotary_export.fusion.rules.casts import CastRule
from rotary_export.fusion.rules.join import join_query_key
from rotary_export.fusion.rules.join_channels import ConcatRule
from rotary_export.fusion.rules.merge_pairs import GatherRule, ReshapeRule
from rotary_export.fusion.rules.microsoft_node import MicrosoftRule
from rotary_export.fusion.rules.onnx_node import OnnxRule
from rotary_export.fusion.rules.partial import PartialRule
from rotary_export.op import spec

# What joins channels comes before what adds products: the whole is found before its part.
STEPS: tuple[tuple[type[Rule], ...], ...] = (
    (OnnxRule, MicrosoftRule),
    (ConcatRule,),
    (ReshapeRule, GatherRule),
    (SumRule, DifferenceRule),
    (PartialRule,),
    (CastRule,),
)


def apply_rules(model: ir.Model) -> Findings:
    """Fuse what the rules find, in place.

    Args:
        model: Normalised.

    Returns:
        What was fused, and what was refused.
    """
    findings = Findings()
    for step in STEPS:
        rules = [rule.rule(findings) for rule in step]
        pattern.RewriteRuleSet(rules, commute=False).apply_to_model(model)
        passes.TopologicalSortPass()(model)
        passes.RemoveUnusedNodesPass()(model)
    join_query_key(model.graph)
    passes.RemoveUnusedNodesPass()(model)
    passes.RemoveUnusedOpsetsPass()(model)
    model.graph.opset_imports.setdefault(spec.DOMAIN, spec.OP_VERSION)
    return findings
