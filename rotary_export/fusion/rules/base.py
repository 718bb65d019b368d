"""What every rewrite rule does: it keeps what it fused, and why it refused."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from typing import Any

from onnxscript import ir
from onnxscript.rewriter import pattern

from rotary_export.fusion.symbolic.refusal import Refusal, name_check
from rotary_export.fusion.values import read_int_attribute
from rotary_export.op import spec

Op = Any  # the rewriter's builder of nodes
Result = Any  # a pattern.MatchResult, which onnxscript does not type


@dataclass
class Findings:
    """What the rules found.

    Attributes:
        fused: How each rotary node was written before, by the name of its output.
        refused: Why a value was not replaced, by its name.
        shared: Tables that were written, by what they are.
    """

    fused: dict[str, str] = field(default_factory=dict)
    refused: dict[str, Refusal] = field(default_factory=dict)
    shared: dict[Any, ir.Value] = field(default_factory=dict)


class Rule(pattern.RewriteRuleClassBase):
    """A pattern, a check and a rewrite; it removes no node itself.

    Values that other nodes read stay; nodes that nothing reads are removed after all rules.
    """

    def __init__(self, findings: Findings) -> None:
        super().__init__(remove_nodes=False)
        self.findings = findings

    def pass_by(self, value: ir.Value, reason: str) -> Result:
        """Refuse what is not this rule's concern."""
        return pattern.MatchResult().fail(reason, value)

    def refuse(self, value: ir.Value, reason: str) -> Result:
        """Refuse a rotary embedding, and keep why."""
        file = sys.modules[type(self).__module__].__file__ or ""
        return self.keep(value, Refusal(reason, name_check(file, f"{type(self).__name__}.check")))

    def keep(self, value: ir.Value, refusal: Refusal) -> Result:
        """Refuse a value for a reason that another function found."""
        self.findings.refused[value.name or ""] = refusal
        return pattern.MatchResult().fail(refusal.reason, value)

    def accept(self, value: ir.Value, was: str) -> Result:
        """Keep how a rotary embedding was written."""
        self.findings.fused[value.name or ""] = was
        return pattern.MatchResult()


def read_rotary_attributes(node: ir.Node) -> dict[str, int]:
    """Return the attributes of a node of our op, defaults included."""
    return {name: read_int_attribute(node, name) for name in spec.ATTRIBUTES}
