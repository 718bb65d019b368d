"""What every operator's handler accepts and returns, and what handlers share.

A handler computes the channels of one output of a node from the channels of its inputs. It returns
None if it does not understand the node: the output's channels are then symbols of their own.
`elementwise.py` and `movement.py` contain the handlers, `operators.py` lists them by operator.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from onnxscript import ir

from rotary_export.fusion.symbolic.polynomials import Channels, UnknownShapeError
from rotary_export.fusion.values import read_dims

FLOATS = {ir.DataType.FLOAT, ir.DataType.DOUBLE, ir.DataType.FLOAT16, ir.DataType.BFLOAT16}

Shape = tuple[int, ...]  # of the trailing axes


class Tracer(Protocol):
    """What `channels.Tracer` is to a handler."""

    multipliers: list[tuple[ir.Value, Channels, int]]

    def trace(self, value: ir.Value, rank: int) -> Channels:
        """Return the channels of a value's last `rank` axes."""


# tracer, node, the output that is traced, its number of trailing axes, their sizes
Handler = Callable[[Tracer, ir.Node, ir.Value, int, Shape], Channels | None]


def read_rank(value: ir.Value | None) -> int:
    """Return the number of a value's axes.

    Raises:
        UnknownShapeError: It is not known.
    """
    dims = read_dims(value)
    if dims is None:
        raise UnknownShapeError(value.name if value is not None else "")
    return len(dims)


def trace_operand(tracer: Tracer, value: ir.Value | None, rank: int) -> Channels:
    """Trace an input of an elementwise node, which may have fewer axes than the output."""
    assert value is not None
    own = min(rank, read_rank(value))
    channels = tracer.trace(value, own)
    return channels.reshape((1,) * (rank - own) + channels.shape)


def make_head(node: ir.Node) -> tuple[Any, ...]:
    """Return what, besides the data, the output of a node depends on."""
    attributes = tuple(sorted((name, str(a.value)) for name, a in node.attributes.items()))
    return (node.op_type, attributes)
