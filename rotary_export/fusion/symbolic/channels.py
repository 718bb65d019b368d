"""Work out what each channel of a value is computed from.

A value's trailing axes (its channels) are followed one by one, its leading axes (batch, heads,
sequence) as a whole. Slice, Split, Concat, Reshape, Gather, Neg, Add, Mul, ... of channels are then
index arithmetic (`operators.py`) on polynomials (`polynomials.py`), whichever of them an exporter
wrote. A node that no handler understands becomes a symbol of its own: equality is never claimed
without a proof.
"""

from __future__ import annotations

from onnxscript import ir

from rotary_export.fusion.symbolic.handler import FLOATS
from rotary_export.fusion.symbolic.operators import HANDLERS
from rotary_export.fusion.symbolic.polynomials import (
    Channels,
    UnknownShapeError,
    symbols,
    trace_constant,
    trailing_shape,
)
from rotary_export.fusion.values import read_constant

_MAX_TERMS = 4


class Tracer:
    """Follows channels up to where they come from.

    Args:
        source: The value at which tracing stops: its channel i is the symbol ("source", i).

    Attributes:
        multipliers: Values that the source, or what was made of it, was multiplied with; their
            channels; and the number of trailing axes that are channels.
    """

    def __init__(self, source: ir.Value | None = None) -> None:
        self.multipliers: list[tuple[ir.Value, Channels, int]] = []
        self._source = source
        self._known: dict[tuple[ir.Value, int], Channels] = {}

    def trace(self, value: ir.Value, rank: int) -> Channels:
        """Return the channels of a value.

        Args:
            value: Any value with a shape.
            rank: Number of trailing axes that are channels.

        Returns:
            Polynomials, in the shape of these axes.

        Raises:
            UnknownShapeError: The sizes of these axes are not known.
        """
        key = (value, rank)
        if key not in self._known:
            self._known[key] = self._compute(value, rank)
        return self._known[key]

    def _compute(self, value: ir.Value, rank: int) -> Channels:
        shape = trailing_shape(value, rank)
        if value is self._source:
            return symbols("source", shape)
        constant = read_constant(value)
        if constant is not None and value.dtype in FLOATS:
            return trace_constant(value, constant, rank, shape)
        node = value.producer()
        if node is not None and node.domain == "":
            handler = HANDLERS.get(node.op_type)
            try:
                found = handler(self, node, value, rank, shape) if handler else None
            except UnknownShapeError:
                found = None
            if found is not None and max(map(len, found.flat), default=0) <= _MAX_TERMS:
                assert found.shape == shape, (node.op_type, found.shape, shape)
                return found
        return symbols("value", shape, value)
