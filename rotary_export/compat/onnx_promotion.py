"""The casts that torch.onnx adds where an operator takes two types."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def promote_without_running() -> Iterator[None]:
    """Let torch.onnx add casts without running the program again.

    It runs each operator on fake tensors to learn the types that the program states already. That
    is a fifth of an export. Operators whose types are mixed still run.
    """
    try:
        from torch.onnx._internal.fx.passes import type_promotion

        interpreter: Any = type_promotion._TypePromotionInterpreter
        run_node = interpreter.run_node
        promote, set_current_node = interpreter._maybe_promote_node, interpreter._set_current_node
        find_rule = type_promotion.get_type_promotion_rule
    except (ImportError, AttributeError):  # a newer torch: slower, not broken
        yield
        return

    def promote_node(self: Any, node: Any) -> Any:
        if node.op != "call_function" or "val" not in node.meta:
            return run_node(self, node)
        rule = find_rule(node, self.type_promotion_table)
        if rule:
            with set_current_node(self, node):
                promote(self, node, rule)
        return node.meta["val"]

    interpreter.run_node = promote_node
    try:
        yield
    finally:
        interpreter.run_node = run_node
