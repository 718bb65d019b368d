"""Composite operators as the ones they consist of, so that torch.onnx need not decompose a program.

torch.onnx decomposes by tracing the whole program again, which takes half the time of an export.
Few composites of a traced model lack a translation: conversions, `detach_`, `&` and `|`.
"""

from __future__ import annotations

from torch.fx import Graph, Node

from rotary_export.compat.programs import bind_arguments
from rotary_export.models.trace.adapt.graph_edit import ATEN, GraphEditor

_CONVERSIONS = (ATEN.to.dtype, ATEN.to.device, ATEN.to.dtype_layout)
_VIEWS = (ATEN.detach_.default, ATEN.detach.default)
_LOGIC = {
    ATEN.__and__.Tensor: ATEN.bitwise_and.Tensor,
    ATEN.__or__.Tensor: ATEN.bitwise_or.Tensor,
}
_ASSERTIONS = (
    ATEN._assert_tensor_metadata.default,
    ATEN._assert_scalar.default,
    ATEN.sym_constrain_range_for_size.default,
)


def replace_composites(graph: Graph, edit: GraphEditor) -> None:
    """Replace what it can, remove assertions and what nothing reads, and give each node its value.

    Args:
        graph: Of a program, in the forms of `adapt_program`; it is changed.
        edit: Of this graph.
    """
    for node in list(graph.nodes):
        if node.target in _ASSERTIONS:
            graph.erase_node(node)
        elif node.target in _CONVERSIONS:
            _replace_conversion(node, edit)
        elif node.target in _VIEWS:
            edit.replace(node, node.args[0])
        elif node.target in _LOGIC:
            node.target = _LOGIC[node.target]
    graph.eliminate_dead_code()
    for node in graph.nodes:
        if node.op == "call_function":
            edit.compute(node)


def _replace_conversion(node: Node, edit: GraphEditor) -> None:
    source = bind_arguments(node)[0]["self"]
    dtype = edit.compute(node).dtype
    if edit.compute(source).dtype == dtype:
        edit.replace(node, source)
    else:
        node.target, node.args, node.kwargs = ATEN._to_copy.default, (source,), {"dtype": dtype}
