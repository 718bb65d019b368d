"""Handlers of operators that compute each channel from the same channel of their inputs."""

from __future__ import annotations

import numpy as np
from onnxscript import ir

from rotary_export.fusion.symbolic.handler import (
    FLOATS,
    Shape,
    Tracer,
    make_head,
    read_rank,
    trace_operand,
)
from rotary_export.fusion.symbolic.polynomials import (
    Channels,
    Polynomial,
    add,
    fill,
    has_symbol,
    multiply,
    number,
    scale,
    symbol,
)

# What they compute from equal channels is equal.
FUNCTIONS = {
    "Cos", "Sin", "Exp", "Log", "Sqrt", "Reciprocal", "Pow", "Max", "Min", "Where",
    "Floor", "Ceil", "Round", "Abs", "Equal", "Greater", "Less", "GreaterOrEqual",
    "LessOrEqual", "And", "Or", "Not", "Mod", "Clip", "IsNaN", "Sigmoid", "Tanh",
}  # fmt: skip

_ADD = np.frompyfunc(add, 2, 1)
_SUB = np.frompyfunc(lambda a, b: add(a, b, -1.0), 2, 1)
_MUL = np.frompyfunc(multiply, 2, 1)
_NEG = np.frompyfunc(lambda a: scale(a, -1.0), 1, 1)


def trace_sum(tracer: Tracer, node: ir.Node, value: ir.Value, rank: int, shape: Shape) -> Channels:
    """Add, Sub."""
    a, b = (trace_operand(tracer, v, rank) for v in node.inputs)
    result = (_ADD if node.op_type == "Add" else _SUB)(a, b)
    return np.broadcast_to(np.asarray(result, object), shape)


def trace_product(
    tracer: Tracer, node: ir.Node, value: ir.Value, rank: int, shape: Shape
) -> Channels:
    """Mul; what the source is multiplied with may be a table of cosines or sines."""
    a, b = (trace_operand(tracer, v, rank) for v in node.inputs)
    from_source = [any(has_symbol(channel, "source") for channel in side.flat) for side in (a, b)]
    if from_source[0] != from_source[1]:
        multiplier = node.inputs[int(from_source[0])]
        assert multiplier is not None
        own = min(rank, read_rank(multiplier))
        tracer.multipliers.append((multiplier, tracer.trace(multiplier, own), own))
    return np.broadcast_to(np.asarray(_MUL(a, b), object), shape)


def trace_neg(tracer: Tracer, node: ir.Node, value: ir.Value, rank: int, shape: Shape) -> Channels:
    """Neg."""
    return np.asarray(_NEG(trace_operand(tracer, node.inputs[0], rank)), object).reshape(shape)


def trace_identity(
    tracer: Tracer, node: ir.Node, value: ir.Value, rank: int, shape: Shape
) -> Channels:
    """Identity."""
    return trace_operand(tracer, node.inputs[0], rank)


def trace_cast(tracer: Tracer, node: ir.Node, value: ir.Value, rank: int, shape: Shape) -> Channels:
    """Cast; between float types it is a rounding, which is verified numerically."""
    if {v.dtype for v in (node.inputs[0], value) if v} <= FLOATS:
        return trace_operand(tracer, node.inputs[0], rank)
    return trace_function(tracer, node, value, rank, shape)


def trace_quotient(
    tracer: Tracer, node: ir.Node, value: ir.Value, rank: int, shape: Shape
) -> Channels:
    """Div; by numbers it is a product."""
    divisor = trace_operand(tracer, node.inputs[1], rank)
    numbers = [_read_number(channel) for channel in divisor.flat]
    if not all(numbers):
        return trace_function(tracer, node, value, rank, shape)
    inverse = np.empty(divisor.size, object)
    for i, x in enumerate(numbers):
        inverse[i] = number(1.0 / x) if x else frozenset()
    dividend = trace_operand(tracer, node.inputs[0], rank)
    result = _MUL(dividend, inverse.reshape(divisor.shape))
    return np.broadcast_to(np.asarray(result, object), shape)


def _read_number(channel: Polynomial) -> float | None:
    if len(channel) != 1:
        return None
    ((product, coefficient),) = channel
    return None if product else coefficient


def trace_function(
    tracer: Tracer, node: ir.Node, value: ir.Value, rank: int, shape: Shape
) -> Channels:
    """Any elementwise function: equal arguments, equal results."""
    operands = [
        np.broadcast_to(trace_operand(tracer, v, rank), shape) if v is not None else None
        for v in node.inputs
    ]
    head = make_head(node)
    return fill(
        shape,
        lambda index: symbol("function", head, *(o if o is None else o[index] for o in operands)),
    )
