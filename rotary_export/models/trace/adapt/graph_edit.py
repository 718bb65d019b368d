"""New nodes in the graph of a traced program."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.fx import Graph, Node

from rotary_export.compat.sizes import allow_sizes_of_one, get_constant

ATEN = torch.ops.aten
_KEPT = ("stack_trace", "nn_module_stack", "source_fn_stack")  # an error names the model's line


class GraphEditor:
    """Inserts nodes in front of one that they replace.

    Args:
        graph: Of the program, or of a part of it.
        fake_mode: Under which operators run on the program's fake tensors.

    Attributes:
        origin: The node that is being replaced.
    """

    def __init__(self, graph: Graph, fake_mode: Any) -> None:
        self.graph = graph
        self.origin: Node | None = None
        self._fake_mode = fake_mode

    def emit(self, target: Any, *args: Any, **kwargs: Any) -> Node:
        """Insert a call in front of `origin`; return it."""
        assert self.origin is not None
        with self.graph.inserting_before(self.origin):
            node = self.graph.call_function(target, args, kwargs)
        node.meta.update({key: self.origin.meta[key] for key in _KEPT if key in self.origin.meta})
        return node

    def shape_of(self, node: Node) -> Sequence[Any]:
        """Return the shape of a node's tensor, symbolic or not."""
        return self.compute(node).shape  # type: ignore[no-any-return]

    def is_one(self, node: Node, axis: int) -> bool:
        """Return whether an axis has the size 1 wherever the graph runs."""
        return get_constant(self.shape_of(node)[axis]) == 1

    def compute(self, node: Node) -> Any:
        """Compute the fake tensor of a new node."""
        if "val" not in node.meta:
            given = torch.fx.node.map_arg((node.args, node.kwargs), self.compute)
            with self._fake_mode, torch.no_grad(), allow_sizes_of_one():
                node.meta["val"] = node.target(*given[0], **given[1])  # type: ignore[operator]
        return node.meta["val"]

    def get_size(self, node: Node, axis: int) -> int | Node:
        """Return the size of an axis: a number, or a node where it is dynamic."""
        constant = get_constant(self.shape_of(node)[axis])
        return self.emit(ATEN.sym_size.int, node, axis) if constant is None else constant

    def replace(self, node: Node, value: Node) -> None:
        """Let a node return the value of another one; its name stays, as a program's outputs do."""
        node.target = ATEN.alias.default
        node.args, node.kwargs = (value,), {}
