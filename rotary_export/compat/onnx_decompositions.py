"""The decomposition of a program by torch.onnx."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch.fx import GraphModule

from rotary_export.compat.dispatch import is_in_place


@contextmanager
def decompose_if_needed() -> Iterator[None]:
    """Let torch.onnx decompose a program only if an operator in it has no translation.

    It always does, by tracing the program again, which takes half the time of an export.
    """
    try:
        from torch.onnx._internal.exporter import _decomp, _fx_passes

        passes: Any = _fx_passes
        decompose, list_translated = (
            passes.decompose_with_registry,
            _decomp.get_onnx_implemented_overloads,
        )
    except (ImportError, AttributeError):  # a newer torch: slower, not broken
        yield
        return

    def decompose_untranslated(program: Any, registry: Any) -> Any:
        translated = set(list_translated(registry))
        return program if _is_translated(program, translated) else decompose(program, registry)

    passes.decompose_with_registry = decompose_untranslated
    try:
        yield
    finally:
        passes.decompose_with_registry = decompose


def _is_translated(program: Any, translated: set[Any]) -> bool:
    """Return whether a program has one graph, and torch.onnx writes each of its calls as it is."""
    graphs = [m for m in program.graph_module.modules() if isinstance(m, GraphModule)]
    return len(graphs) == 1 and all(
        node.target in translated and not is_in_place(node.target) and "val" in node.meta
        for node in program.graph.nodes
        if node.op == "call_function"
    )
