"""The nodes of an ONNX graph, those in branches and loop bodies included.

No import of onnx: a deployment with ONNX Runtime reads a file with whatever parsed it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rotary_export.op import spec


def list_graphs(graph: Any) -> Iterator[Any]:
    """Yield a `GraphProto`, and the graphs in attributes of its nodes (If, Loop, Scan)."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            for inner in [attribute.g] if attribute.HasField("g") else attribute.graphs:
                yield from list_graphs(inner)


def list_nodes(graph: Any) -> Iterator[Any]:
    """Yield the nodes of a `GraphProto`, and of the graphs in it."""
    for each in list_graphs(graph):
        yield from each.node


def count_rotary_nodes(graph: Any) -> int:
    """Count the nodes of our op in a `GraphProto`, and in the graphs in it."""
    own = (spec.DOMAIN, spec.OP_TYPE)
    return sum((node.domain, node.op_type) == own for node in list_nodes(graph))
