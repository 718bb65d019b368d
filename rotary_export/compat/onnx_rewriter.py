"""onnxscript's rewriter: its pattern matcher, and rules that it does not export."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def match_by_operator() -> Iterator[None]:
    """Let onnxscript try a pattern only at nodes of the operator that gives its first result.

    It tries each at every node, and lists all nodes of the graph for a pattern of several results.
    That is quadratic: a quarter of the export of a model of 24 layers. The same nodes match.
    """
    try:
        from onnxscript.rewriter._basics import MatchResult
        from onnxscript.rewriter._matcher import SimplePatternMatcher

        matcher: Any = SimplePatternMatcher
        match = matcher.match
    except (ImportError, AttributeError):  # a newer onnxscript: slower, not broken
        yield
        return

    def match_if_operator(self: Any, model: Any, graph: Any, node: Any, **options: Any) -> Any:
        first = self.pattern.output_nodes[0].op_identifier()
        if first is not None and first != node.op_identifier():
            return MatchResult().fail("Another operator.")
        return match(self, model, graph, node, **options)

    matcher.match = match_if_operator
    try:
        yield
    finally:
        matcher.match = match


def list_norm_rules() -> tuple[Any, ...]:
    """Return onnxscript's rules that write a root mean square norm as `RMSNormalization`."""
    try:
        from onnxscript.rewriter.rules.fusion._rms_normalization import rms_normalization_rules
    except ImportError:  # a newer onnxscript: slower, not broken
        return ()
    return tuple(rms_normalization_rules)
