"""Find the narrowest type that the model computes in between its rotary calls and its outputs.

A difference of one rounding in a rotary call grows by the roundings that follow it. An output that
is float32, of a model whose arithmetic is float16, differs by roundings of float16.
"""

from __future__ import annotations

from collections.abc import Iterable

from onnxscript import ir

PRECISION = {"bfloat16": 8, "float16": 11, "float32": 24, "float64": 53}  # bits
_NAMES = {
    ir.DataType.BFLOAT16: "bfloat16",
    ir.DataType.FLOAT16: "float16",
    ir.DataType.FLOAT: "float32",
    ir.DataType.DOUBLE: "float64",
}


def find_narrowest_types(model: ir.Model, calls: Iterable[str]) -> dict[str, str]:
    """Return the narrowest floating-point type on the way from a rotary call to each value.

    Args:
        model: Sorted, with inferred types.
        calls: Names of the values that rotary calls return.

    Returns:
        Types by name, of the values that depend on a rotary call.
    """
    found: dict[str, str] = {}
    for node in model.graph:
        _follow(node, set(calls), found)
    return found


def _follow(node: ir.Node, calls: set[str], found: dict[str, str]) -> list[str]:
    """Add the types of a node's outputs; return those of what it reads and computes inside."""
    types = [found[v.name] for v in node.inputs if v is not None and v.name in found]
    for attribute in node.attributes.values():
        if attribute.type == ir.AttributeType.GRAPH:
            for inner in attribute.as_graph():
                types += _follow(inner, calls, found)
    for value in node.outputs:
        if value.name is None or not (types or value.name in calls):
            continue
        own = None if value.dtype is None else _NAMES.get(value.dtype)
        if own is not None:
            found[value.name] = min((*types, own), key=PRECISION.__getitem__)
            types = [*types, found[value.name]]
    return types
