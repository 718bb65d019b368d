"""Sort the nodes of a graph, so that each comes after those whose results it reads.

ONNX requires it and ONNX Runtime does not; its float16 converter appends nodes at the end.
"""

from __future__ import annotations

from onnx import FunctionProto, GraphProto, ModelProto, NodeProto

from rotary_export.errors import RotaryExportError


def sort_nodes(model: ModelProto, name: str) -> ModelProto:
    """Return a model whose nodes are sorted; those that are keep their order.

    Args:
        model: It is not changed.
        name: For messages.

    Raises:
        RotaryExportError: A graph reads or returns what no node computes, or the nodes form a
            cycle.
    """
    _check_computed(model.graph, name)
    if all(_is_sorted(list(graph.node)) for graph in _list_graphs(model)):
        return model
    copy = ModelProto()
    copy.CopyFrom(model)
    for graph in _list_graphs(copy):
        order = _order(list(graph.node), name)
        del graph.node[:]
        graph.node.extend(order)
    return copy


def _check_computed(graph: GraphProto, name: str) -> None:
    made = {"", *(value.name for value in (*graph.input, *graph.initializer))}
    made |= {tensor.values.name for tensor in graph.sparse_initializer}
    made |= {output for node in graph.node for output in node.output}
    for node in graph.node:
        for missing in _list_read(node) - made:
            raise RotaryExportError(
                f"{name} is damaged: no node computes {missing}, an input of {node.op_type}"
            )
    for output in graph.output:
        if output.name not in made:
            raise RotaryExportError(f"{name} is damaged: no node computes its output {output.name}")


def _list_graphs(model: ModelProto) -> list[GraphProto | FunctionProto]:
    """Return the graph, the functions, and the graphs inside their nodes; inner ones first."""
    found: list[GraphProto | FunctionProto] = [model.graph, *model.functions]
    for graph in found:  # it grows
        found += [inner for node in graph.node for inner in _list_inner(node)]
    return found[::-1]


def _list_inner(node: NodeProto) -> list[GraphProto]:
    found = [attribute.g for attribute in node.attribute if attribute.HasField("g")]
    return found + [graph for attribute in node.attribute for graph in attribute.graphs]


def _list_read(node: NodeProto) -> set[str]:
    """Return the names that a node reads; those that its inner graphs read from outside as well."""
    names = set(node.input)
    for graph in _list_inner(node):
        own = {value.name for value in (*graph.input, *graph.initializer)}
        own |= {output for each in graph.node for output in each.output}
        read = {value.name for value in graph.output}
        names |= read.union(*map(_list_read, graph.node)) - own
    return names


def _is_sorted(nodes: list[NodeProto]) -> bool:
    later = {output for node in nodes for output in node.output if output}
    for node in nodes:
        if later & _list_read(node):
            return False
        later -= set(node.output)
    return True


def _order(nodes: list[NodeProto], name: str) -> list[NodeProto]:
    maker = {output: index for index, node in enumerate(nodes) for output in node.output if output}
    waits = [{maker[read] for read in _list_read(node) if read in maker} for node in nodes]
    order: list[int] = []
    placed: set[int] = set()
    opened: set[int] = set()
    for first in range(len(nodes)):
        stack = [first]
        while stack:
            index = stack[-1]
            if index in placed:
                stack.pop()
                continue
            missing = sorted(waits[index] - placed, reverse=True)
            if not missing:
                placed.add(index)
                order.append(stack.pop())
                continue
            if index in opened:
                raise RotaryExportError(f"{name} is damaged: its nodes form a cycle")
            opened.add(index)
            stack += missing
    return [nodes[index] for index in order]
