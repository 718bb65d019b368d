"""Attention in the forms that torch.onnx translates and ONNX Runtime runs.

torch broadcasts query, key, value and mask with each other. `ai.onnx::Attention`, which torch.onnx
writes from opset 23 on, does less (ONNX Runtime 1.31, CPU, tried form by form): of the mask only
the axes of the batch and the heads; heads of the key only in groups; nothing else. So

1. tensors that are not (B, N, S, H) are brought into that form;
2. keys and values of one batch row or of one head for all are expanded, or marked as one group;
3. the axes of queries and keys of a mask that are 1 are expanded to their sizes;
4. a bool mask of float64 queries, for which ONNX Runtime has no kernel, becomes one that is added.
   The function body of ONNX hides by infinity, so that a row that sees nothing would be NaN.
"""

from __future__ import annotations

import torch
from torch.fx import Node

from rotary_export.compat.programs import bind_arguments
from rotary_export.compat.sizes import get_constant
from rotary_export.models.trace.adapt.graph_edit import ATEN, GraphEditor

ATTENTION = ATEN.scaled_dot_product_attention.default
_NEWEST_WITHOUT_NODE = 22  # opset; torch.onnx writes primitives, which broadcast any mask


def adapt_attention(node: Node, edit: GraphEditor, opset: int) -> None:
    """Bring one call into a form that ONNX has.

    Args:
        node: A call of `ATTENTION`; it is changed.
        edit: Of its graph.
        opset: Of ai.onnx.
    """
    edit.origin = node
    values, _ = bind_arguments(node)
    query, key, value, mask = (values[name] for name in ("query", "key", "value", "attn_mask"))
    leading = max(len(edit.shape_of(part)) for part in (query, key, value)) - 2
    tensors = [_pad_rank(edit, part, leading + 2) for part in (query, key, value)]
    for axis in range(leading - 1):
        tensors = _broadcast(edit, tensors, axis)
    grouped = values["enable_gqa"]
    if leading:
        tensors, grouped = _match_heads(edit, tensors, grouped)
    if mask is not None and opset > _NEWEST_WITHOUT_NODE:
        mask = _expand_mask(edit, mask, tensors)
        if {edit.compute(mask).dtype, edit.compute(query).dtype} == {torch.bool, torch.float64}:
            added = edit.emit(ATEN.where.Scalar, mask, 0.0, torch.finfo(torch.float32).min)
            mask = edit.emit(ATEN.to.dtype, added, torch.float64)
    if leading != 2:
        if mask is not None and len(edit.shape_of(mask)) > 2:
            mask = _flatten_mask(edit, _pad_rank(edit, mask, leading + 2), tensors[0])
        sizes = [edit.get_size(tensors[0], axis) for axis in range(leading)]
        tensors = [_make_four(edit, part) for part in tensors]
    call = (*tensors, mask, values["dropout_p"], values["is_causal"])
    options = {"scale": values["scale"], "enable_gqa": grouped}
    if leading == 2:
        node.args, node.kwargs = call, options
        return
    result = edit.emit(ATTENTION, *call, **options)
    ends = [edit.get_size(result, axis) for axis in (2, 3)]
    edit.replace(node, edit.emit(ATEN.reshape.default, result, [*sizes, *ends]))


def _pad_rank(edit: GraphEditor, node: Node, rank: int) -> Node:
    """Insert axes of size 1 in front."""
    while len(edit.shape_of(node)) < rank:
        node = edit.emit(ATEN.unsqueeze.default, node, 0)
    return node


def _expand(edit: GraphEditor, node: Node, sizes: dict[int, int | Node]) -> Node:
    """Expand axes of size 1, given by their number from the front."""
    rank = len(edit.shape_of(node))
    return edit.emit(ATEN.expand.default, node, [sizes.get(axis, -1) for axis in range(rank)])


def _broadcast(edit: GraphEditor, nodes: list[Node], axis: int) -> list[Node]:
    """Expand an axis of the tensors in which it is 1 to its size in the others."""
    larger = next((node for node in nodes if not edit.is_one(node, axis)), None)
    if larger is None:
        return nodes
    return [
        _expand(edit, node, {axis: edit.get_size(larger, axis)})
        if edit.is_one(node, axis)
        else node
        for node in nodes
    ]


def _match_heads(edit: GraphEditor, tensors: list[Node], grouped: bool) -> tuple[list[Node], bool]:
    """Give key and value a number of heads that ONNX accepts; return whether they are grouped."""
    heads = [get_constant(edit.shape_of(node)[-3]) for node in tensors]
    if not grouped and heads[0] != 1 and heads[1:] == [1, 1]:
        return tensors, True  # one head for all
    if not grouped:
        return _broadcast(edit, tensors, len(edit.shape_of(tensors[0])) - 3), False
    if heads[1] != heads[2] and None not in heads:  # of groups of different sizes
        query, *others = tensors
        repeated = [
            edit.emit(ATEN.repeat_interleave.self_int, node, heads[0] // count, -3)  # type: ignore[operator]
            for node, count in zip(others, heads[1:], strict=True)
        ]
        return [query, *repeated], False
    return tensors, heads[0] != heads[1]


def _expand_mask(edit: GraphEditor, mask: Node, tensors: list[Node]) -> Node:
    """Expand the axes of queries and keys of a mask where they are 1; its other axes may be 1."""
    mask = _pad_rank(edit, mask, 2)
    rank = len(edit.shape_of(mask))
    sizes = {
        rank + axis: edit.get_size(source, -2)
        for axis, source in ((-2, tensors[0]), (-1, tensors[1]))
        if edit.is_one(mask, axis) and not edit.is_one(source, -2)
    }
    return _expand(edit, mask, sizes) if sizes else mask


def _make_four(edit: GraphEditor, node: Node) -> Node:
    """Bring (..., S, H) into the form (B, N, S, H)."""
    node = _pad_rank(edit, node, 4)
    rank = len(edit.shape_of(node))
    return edit.emit(ATEN.flatten.using_ints, node, 0, rank - 4) if rank > 4 else node


def _flatten_mask(edit: GraphEditor, mask: Node, query: Node) -> Node:
    """Bring a mask of the rank of its query into the form (B, N, S, T)."""
    rank = len(edit.shape_of(mask))
    sizes = {
        axis: edit.get_size(query, axis)
        for axis in range(rank - 3)
        if edit.is_one(mask, axis) and not edit.is_one(query, axis)
    }
    return _make_four(edit, _expand(edit, mask, sizes) if sizes else mask)
