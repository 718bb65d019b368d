"""The operators that are understood, each with its handler.

To add one, write its handler in `elementwise.py` or `movement.py` and list it here.
"""

from __future__ import annotations

from rotary_export.fusion.symbolic import elementwise, movement
from rotary_export.fusion.symbolic.handler import Handler

HANDLERS: dict[str, Handler] = {
    "Add": elementwise.trace_sum,
    "Sub": elementwise.trace_sum,
    "Mul": elementwise.trace_product,
    "Neg": elementwise.trace_neg,
    "Div": elementwise.trace_quotient,
    "Cast": elementwise.trace_cast,
    "Identity": elementwise.trace_identity,
    **dict.fromkeys(elementwise.FUNCTIONS, elementwise.trace_function),
    "Slice": movement.trace_slice,
    "Split": movement.trace_split,
    "Concat": movement.trace_concat,
    "Gather": movement.trace_gather,
    "Reshape": movement.trace_reshape,
    "Squeeze": movement.trace_reshape,
    "Unsqueeze": movement.trace_reshape,
    "Flatten": movement.trace_reshape,
    "Transpose": movement.trace_transpose,
    "Expand": movement.trace_expand,
    "Tile": movement.trace_tile,
    "MatMul": movement.trace_matmul,
}
