"""What is known of a value or a node before anything runs: sizes, constants, attributes."""

from __future__ import annotations

from typing import Any

import numpy as np
from onnxscript import ir

Dims = list[int | str | None]  # a size, the name of a symbolic size, None for an unknown one

_MAX_CONSTANT = 2**22  # elements of a constant table whose columns are compared


def read_dims(value: ir.Value | None) -> Dims | None:
    """Return a value's shape; None if its rank is not known."""
    if value is None or value.shape is None:
        return None
    return [dim if isinstance(dim, int) else dim.value for dim in value.shape]


def read_constant(value: ir.Value | None) -> np.ndarray[Any, Any] | None:
    """Return the array of a value that no run can change."""
    if value is None or value.is_graph_input():
        return None
    tensor = value.const_value
    if tensor is None:
        node = value.producer()
        if node is None or node.op_type != "Constant" or node.domain:
            return None
        tensor = ir.convenience.get_const_tensor(value)
    return None if tensor is None or tensor.size > _MAX_CONSTANT else tensor.numpy()


def read_ints(value: ir.Value | None) -> list[int] | None:
    """Return a constant of integers as a flat list."""
    array = read_constant(value)
    return None if array is None else [int(i) for i in array.reshape(-1)]


def read_int_attribute(node: ir.Node, name: str, default: int = 0) -> int:
    """Return an integer attribute of a node, or the default."""
    attribute = node.attributes.get(name)
    return default if attribute is None else attribute.as_int()


def is_produced_by(value: ir.Value | None, *op_types: str) -> bool:
    """Return whether a value is computed by an ai.onnx node of one of these types."""
    node = None if value is None else value.producer()
    return node is not None and node.op_type in op_types and not node.domain


def joins_channels(node: ir.Node) -> bool:
    """Return whether a node is a Concat along the last axis."""
    if node.op_type != "Concat" or node.domain:
        return False
    axis, dims = node.attributes["axis"].as_int(), read_dims(node.outputs[0])
    return axis == -1 or (dims is not None and axis == len(dims) - 1)


def is_sum_of_products(node: ir.Node) -> bool:
    """Return whether a node is an Add or Sub of two Mul."""
    is_sum = node.op_type in ("Add", "Sub") and not node.domain
    return is_sum and all(is_produced_by(value, "Mul") for value in node.inputs)
