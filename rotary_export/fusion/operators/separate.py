"""The opposite of `attention.py`, for runtimes whose attention has no groups of heads."""

from __future__ import annotations

from onnxscript import ir

from rotary_export.fusion.values import read_dims

_INPUTS = 4  # query, key, value, mask


def separate_heads(model: ir.Model) -> None:
    """Join the cache before each attention of grouped heads, and repeat its keys and values.

    Args:
        model: Changed in place; the heads and channels of keys and values are known.
    """
    for node in list(model.graph):
        if node.op_type != "Attention" or node.domain:
            continue
        query, key, value, *_ = (read_dims(each) for each in node.inputs)
        if query and key and value and len(query) == 4 and query[1] != key[1]:
            _separate(model.graph, node, query[1])


def _separate(graph: ir.Graph, node: ir.Node, heads: int | str | None) -> None:
    """Repeat keys and values of one node for so many heads."""
    pasts = node.inputs[_INPUTS:]
    for index, past in enumerate(pasts or (None, None), 1):
        value = node.inputs[index]
        assert value is not None
        if past is not None:
            value = _join(graph, node, past, value, node.outputs[index])
        node.replace_input_with(index, _repeat(graph, node, value, heads))
    if pasts:
        node.resize_inputs(_INPUTS)
        node.resize_outputs(1)


def _join(
    graph: ir.Graph, node: ir.Node, past: ir.Value, new: ir.Value, present: ir.Value
) -> ir.Value:
    """Write what the node returns as present."""
    joined = ir.node("Concat", [past, new], {"axis": 2})
    graph.insert_before(node, joined)
    value = joined.outputs[0]
    value.shape, value.type = present.shape, present.type
    name, present.name = present.name, None
    ir.convenience.replace_all_uses_with(present, value, replace_graph_outputs=True)
    value.name = name
    return value


def _repeat(graph: ir.Graph, node: ir.Node, value: ir.Value, heads: int | str | None) -> ir.Value:
    """Write (B, N, S, H) with each head as often as its group is large."""
    dims = read_dims(value)
    assert dims is not None
    _, few, _, head_dim = dims
    assert isinstance(heads, int)
    assert isinstance(few, int)
    assert isinstance(head_dim, int)
    axis, members, shape = (
        ir.node("Constant", [], {"value_ints": numbers})
        for numbers in ([2], [1, 1, heads // few, 1, 1], [0, heads, -1, head_dim])
    )
    apart = ir.node("Unsqueeze", [value, axis.outputs[0]])
    wide = ir.node("Expand", [apart.outputs[0], members.outputs[0]])
    many = ir.node("Reshape", [wide.outputs[0], shape.outputs[0]])
    graph.insert_before(node, [axis, members, shape, apart, wide, many])
    return many.outputs[0]
