"""Computes with pairs of real numbers, (..., 2), in the place of complex ones."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from rotary_export.compat.programs import bind_arguments
from rotary_export.models.trace.adapt.graph_edit import ATEN, GraphEditor

_DATA = ("tensors", "src", "values", "other")  # arguments that are complex if the first one is
Part = Any  # a node of a real tensor, a number, or None: zero everywhere


def is_complex(node: Node) -> bool:
    """Return whether a node returns a complex tensor, or some."""
    value = node.meta.get("val")
    values = value if isinstance(value, (list, tuple)) else [value]
    return any(isinstance(each, Tensor) and each.is_complex() for each in values)


def is_tensor(value: Any) -> bool:
    """Return whether a value is the node of a tensor, not of a size."""
    return isinstance(value, Node) and isinstance(value.meta.get("val", Tensor()), Tensor)


class PairEditor(GraphEditor):
    """Computes with pairs.

    Args:
        graph: As `GraphEditor`.
        fake_mode: As `GraphEditor`.

    Attributes:
        pairs: By a node of a complex tensor, the node of its pairs.
    """

    def __init__(self, graph: torch.fx.Graph, fake_mode: Any) -> None:
        super().__init__(graph, fake_mode)
        self.pairs: dict[Node, Node] = {}

    def touches(self, node: Node) -> bool:
        """Return whether a node has a complex argument or result."""
        return is_complex(node) or any(source in self.pairs for source in node.all_input_nodes)

    def read_pair(self, node: Node) -> None:
        """Note that the tensor behind a placeholder was replaced by its pairs."""
        value = node.meta["val"]
        with value.fake_mode:
            node.meta["val"] = torch.view_as_real(value)
        self.pairs[node] = node

    def note_pair(self, node: Node, pair: Node) -> None:
        """Note the pairs of a complex tensor, or the list of those of several."""
        value = node.meta["val"]
        if isinstance(value, Tensor):
            with value.fake_mode:  # type: ignore[attr-defined]
                pair.meta["val"] = torch.view_as_real(value.resolve_conj())
        self.pairs[node] = pair

    def take_item(self, node: Node) -> Node:
        """Take one tensor of a list."""
        return self.emit(operator.getitem, self.pairs[node.args[0]], node.args[1])  # type: ignore[index]

    def split(self, value: Any) -> tuple[Part, Part]:
        """Return the real and imaginary part of a complex or real tensor, or of a number."""
        if isinstance(value, Node):
            if value not in self.pairs:
                return value, None
            return self.split_pair(self.pairs[value])
        return (value.real, value.imag) if isinstance(value, complex) else (value, None)

    def split_pair(self, pair: Node) -> tuple[Node, Node]:
        """Return the real and imaginary part of pairs."""
        return self.emit(ATEN.select.int, pair, -1, 0), self.emit(ATEN.select.int, pair, -1, 1)

    def join(self, real: Part, imaginary: Part) -> Node:
        """Return the pairs of two parts of one shape; one at least is a tensor."""
        parts = [real, imaginary]
        like = next(part for part in parts if isinstance(part, Node))
        for index, part in enumerate(parts):
            if not isinstance(part, Node):
                parts[index] = self.emit(ATEN.full_like.default, like, part or 0)
        return self.emit(ATEN.stack.default, parts, -1)

    def pair(self, value: Node) -> Node:
        """Return the pairs of a complex or real tensor."""
        return self.pairs[value] if value in self.pairs else self.join(*self.split(value))

    def lift(self, value: Any) -> Any:
        """Give a real tensor an axis for the parts, over which it is broadcast."""
        return self.emit(ATEN.unsqueeze.default, value, -1) if is_tensor(value) else value

    def call(self, node: Node, **changes: Any) -> Node:
        """Call a node's own operator on pairs.

        Args:
            node: What is replaced.
            changes: By name, arguments in the place of its own.
        """

        def exchange(value: Any, is_data: bool) -> Any:
            if isinstance(value, torch.dtype) and value.is_complex:
                return value.to_real()
            if isinstance(value, (list, tuple)):
                return [exchange(each, is_data) for each in value]
            if isinstance(value, Node) and (is_data or value in self.pairs):
                return self.pair(value)
            return value

        values, keywords = bind_arguments(node)
        values = {n: exchange(value, n in _DATA) for n, value in (values | changes).items()}
        positional = [value for name, value in values.items() if name not in keywords]
        return self.emit(node.target, *positional, **{name: values[name] for name in keywords})
