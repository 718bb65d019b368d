"""Make query and key one node: two rotary nodes with the same tables become one with a key.

This is a pass and not a rewrite rule, since the two nodes are not connected: a pattern would try
every pair of nodes, and can't express that neither is computed from the other.
"""

from __future__ import annotations

from typing import Any

from onnxscript import ir

from rotary_export.fusion.values import read_dims, read_int_attribute
from rotary_export.op import spec


def is_rotary(node: ir.Node) -> bool:
    """Return whether this is a node of our op."""
    return (node.domain, node.op_type) == (spec.DOMAIN, spec.OP_TYPE)


def join_query_key(graph: ir.Graph) -> int:
    """Join rotary nodes in pairs, in place; subgraphs too.

    Args:
        graph: Sorted.

    Returns:
        The number of pairs.
    """
    pairs = 0
    waiting: dict[Any, ir.Node] = {}
    place = {node: i for i, node in enumerate(graph)}
    for node in list(graph):
        for attribute in node.attributes.values():
            if attribute.type == ir.AttributeType.GRAPH:
                pairs += join_query_key(attribute.as_graph())
        if not is_rotary(node) or len(node.inputs) > 4 or len(node.outputs) != 1:
            continue
        key = _make_key(node)
        if key is None:
            continue
        first = waiting.pop(key, None)
        if first is None or _depends_on(node, first, place):
            waiting[key] = node
            continue
        _join(graph, first, node)
        pairs += 1
    if pairs:
        graph.sort()
    return pairs


def _make_key(node: ir.Node) -> Any:
    """Return what must be equal for two nodes to be one, or None."""
    x = node.inputs[0]
    dims = read_dims(x)
    if x is None or dims is None or not isinstance(dims[-1], int):
        return None
    heads = read_int_attribute(node, "num_heads")
    if len(dims) == 4:
        sizes = (dims[0], dims[2], dims[3])
    else:
        sizes = (dims[0], dims[1], dims[-1] // max(heads, 1))
    if None in sizes:
        return None
    tables = (*node.inputs[1:], None)[:3]
    kind = (
        read_int_attribute(node, "interleaved"),
        read_int_attribute(node, "rotary_embedding_dim"),
        len(dims),
        x.dtype,
    )
    return (*tables, *sizes, *kind)


def _depends_on(node: ir.Node, other: ir.Node, place: dict[ir.Node, int]) -> bool:
    """Return whether `node` is computed from `other`, which stands before it."""
    queue, seen = [node], {node}
    while queue:
        for value in _read_values(queue.pop()):
            above = value.producer()
            if above is other:
                return True
            if above is not None and above not in seen and place.get(above, -1) > place[other]:
                seen.add(above)
                queue.append(above)
    return False


def _read_values(node: ir.Node) -> list[ir.Value]:
    """Return what a node reads, in its subgraphs too."""
    values = [value for value in node.inputs if value is not None]
    for attribute in node.attributes.values():
        if attribute.type == ir.AttributeType.GRAPH:
            for inner in attribute.as_graph().all_nodes():
                values.extend(value for value in inner.inputs if value is not None)
    return values


def _join(graph: ir.Graph, first: ir.Node, second: ir.Node) -> None:
    """Replace two nodes by one; the one with more heads is X."""

    def count_heads(node: ir.Node) -> int:
        dims = read_dims(node.inputs[0])
        size = (
            dims[1]
            if dims is not None and len(dims) == 4
            else read_int_attribute(node, "num_heads")
        )
        return size if isinstance(size, int) else 0

    query, key = first, second
    if count_heads(second) > count_heads(first):
        query, key = second, first
    attributes = {
        name: read_int_attribute(query, name)
        for name in ("interleaved", "rotary_embedding_dim", "num_heads")
    }
    attributes["kv_num_heads"] = read_int_attribute(key, "num_heads")
    tables = (*query.inputs[1:], None)[:3]
    node = ir.node(
        spec.OP_TYPE,
        [query.inputs[0], *tables, key.inputs[0]],
        {name: value for name, value in attributes.items() if value},
        domain=spec.DOMAIN,
        num_outputs=2,
    )
    old = [query.outputs[0], key.outputs[0]]
    ir.convenience.replace_nodes_and_values(
        graph, second, [first, second], [node], old, list(node.outputs)
    )
