"""Operators on bools that ONNX Runtime's CPU does not run: as logic, or as numbers.

1. A choice between bools, Where(c, a, b), is (c and a) or (not c and b).
2. A filled mask is a choice between the mask and one value.
3. An Einsum of bools, which ONNX does not have, is one of numbers: the result is true if it is > 0.
"""

from __future__ import annotations

import torch
from torch.fx import Node

from rotary_export.compat.programs import bind_arguments
from rotary_export.models.trace.adapt.graph_edit import ATEN, GraphEditor

_FILLS = (ATEN.masked_fill.Scalar, ATEN.masked_fill.Tensor)
_CALLS = (*_FILLS, ATEN.where.self, ATEN.einsum.default)


def is_bool_call(node: Node) -> bool:
    """Return whether a node is one of these operators, and its result or an operand is of bools."""
    if node.target not in _CALLS:
        return False
    nodes = [node, *(node.all_input_nodes if node.target == ATEN.einsum.default else ())]
    return any(each.meta["val"].dtype == torch.bool for each in nodes)


def adapt_bools(node: Node, edit: GraphEditor) -> None:
    """Replace one call.

    Args:
        node: A call for which `is_bool_call` holds; it is changed.
        edit: Of its graph.
    """
    edit.origin = node
    values, _ = bind_arguments(node)
    if node.target == ATEN.einsum.default:
        dtype = node.meta["val"].dtype
        is_bool = dtype == torch.bool
        wide = torch.float32 if is_bool else dtype
        numbers = [edit.emit(ATEN.to.dtype, each, wide) for each in values["tensors"]]
        product = edit.emit(ATEN.einsum.default, values["equation"], numbers)
        edit.replace(node, edit.emit(ATEN.gt.Scalar, product, 0.0) if is_bool else product)
        return
    if node.target == ATEN.where.self:
        condition, chosen, other = (values[name] for name in ("condition", "self", "other"))
    else:
        condition, chosen, other = (values[name] for name in ("mask", "value", "self"))
    rest = edit.emit(
        ATEN.logical_and.default, edit.emit(ATEN.logical_not.default, condition), other
    )
    if isinstance(chosen, Node):
        chosen = edit.emit(ATEN.logical_and.default, condition, chosen)
    elif chosen:
        chosen = condition
    else:
        edit.replace(node, rest)
        return
    edit.replace(node, edit.emit(ATEN.logical_or.default, chosen, rest))
