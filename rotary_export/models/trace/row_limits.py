"""Where positions and ids leave a table: an embedding has no row there.

Nothing in a trace says so: unlike a slice, a lookup depends on values. So the largest index is
derived from the range that it is computed from, or is a limit of the input that it is.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import sympy
import torch
from torch import Tensor
from torch.fx import Node

from rotary_export.bundle.manifest import TensorInfo
from rotary_export.compat.sizes import find_expression
from rotary_export.models.error_text import locate

_ATEN = torch.ops.aten
_MOVES = {
    getattr(_ATEN, name)
    for name in (
        "_to_copy alias clone contiguous detach detach_ expand flip lift_fresh_copy permute repeat "
        "reshape squeeze t to transpose unsqueeze view _unsafe_view _assert_tensor_metadata"
    ).split()
}


def list_row_limits(program: Any) -> Iterator[tuple[Any, str]]:
    """Yield the conditions under which a lookup finds a row, as sympy expressions, and their lines.

    Args:
        program: The `torch.export.ExportedProgram`.
    """
    for node in program.graph.nodes:
        for table, axis, index in _read_lookups(node):
            rows = table.meta["val"].shape[axis]
            largest = _find_largest(index) if isinstance(rows, int) else None
            if largest is not None:
                yield sympy.Le(largest, rows - 1), locate(node)


def find_id_limits(program: Any, infos: Sequence[TensorInfo]) -> tuple[TensorInfo, ...]:
    """Return the inputs with the limits of those by which rows are looked up.

    Args:
        program: The `torch.export.ExportedProgram`.
        infos: Its inputs.
    """
    names = dict(zip(program.graph_signature.user_inputs, infos, strict=True))
    rows: dict[str, int] = {}
    for node in program.graph.nodes:
        for table, axis, index in _read_lookups(node):
            found, count = names.get(_find_source(index).name), table.meta["val"].shape[axis]
            # A negative index counts from the end, but for these two operators.
            if found and isinstance(count, int) and node.target != _ATEN.index.Tensor:
                rows[found.name] = min(count, rows.get(found.name, count))
    return tuple(
        replace(info, limits=(0, rows[info.name] - 1))
        if info.limits is None and info.name in rows
        else info
        for info in infos
    )


def _find_source(node: Node) -> Node:
    """Return what a node only moves numbers of."""
    while getattr(node.target, "overloadpacket", None) in _MOVES:
        node = node.all_input_nodes[0]
    return node


def _read_lookups(node: Node) -> Iterator[tuple[Node, int, Node]]:
    """Yield the tables that a node reads rows of, their axis and the index."""
    arguments: Any = node.args
    found: Sequence[tuple[Any, Any, Any]] = ()
    if node.target == _ATEN.embedding.default:
        found = [(arguments[0], 0, arguments[1])]
    elif node.target == _ATEN.index_select.default:
        found = [arguments]
    elif node.target == _ATEN.index.Tensor:
        found = [(arguments[0], axis, index) for axis, index in enumerate(arguments[1])]
    for table, axis, index in found:
        if isinstance(index, Node) and isinstance(table.meta.get("val"), Tensor):
            yield table, axis, index


def _find_largest(index: Node) -> Any:
    """Return the largest value of an index that counts, as an expression in sizes; else None."""
    index = _find_source(index)
    operator, args = getattr(index.target, "overloadpacket", None), index.args
    if operator == _ATEN.arange and (len(args) < 3 or args[2] == 1):
        end = find_expression(_read(args[0] if len(args) == 1 else args[1]))
        return None if end is None else end - 1
    if operator in (_ATEN.add, _ATEN.sub) and not index.kwargs and isinstance(args[0], Node):
        largest, added = _find_largest(args[0]), find_expression(_read(args[1]))
        if largest is not None and added is not None:
            return largest + added if operator == _ATEN.add else largest - added
    return None


def _read(argument: Any) -> Any:
    """Return a number, or the size that a node computes."""
    return argument.meta.get("val") if isinstance(argument, Node) else argument
