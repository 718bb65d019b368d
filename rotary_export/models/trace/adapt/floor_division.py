"""Floor division of sizes, as in Python: `-(-n // 4)` is n / 4 rounded up.

torch.onnx writes it as ONNX's Div, which rounds to zero. That differs for a negative dividend.
"""

from __future__ import annotations

from typing import Any

from onnxscript import ir
from onnxscript import opset18 as op

_NEGATIVE = ("Neg", "Sub")
_MOVES = ("Identity", "Cast", "Reshape", "Squeeze", "Unsqueeze")
_COMPUTES = ("Add", "Mul", "Div", "Max", "Min")


def translate_floor_division(dividend: Any, divisor: Any) -> Any:
    """Translate `dividend // divisor`, sizes or numbers, to ONNX."""
    if not (_may_be_negative(dividend) or _may_be_negative(divisor)):
        return op.Div(dividend, divisor)
    # ONNX's Mod has the sign of the divisor, as Python's has: the division is exact.
    return op.Div(op.Sub(dividend, op.Mod(dividend, divisor)), divisor)


def _may_be_negative(value: Any) -> bool:
    """Return whether a number, or what a node computes of sizes, may be below 0."""
    if isinstance(value, (int, float)):
        return value < 0
    node = value.producer() if isinstance(value, ir.Value) else None
    if node is None:
        return False  # an input
    if node.op_type == "Constant":
        constant = ir.convenience.get_const_tensor(value)
        return constant is None or bool((constant.numpy() < 0).any())
    if node.op_type in _MOVES:
        return _may_be_negative(node.inputs[0])
    if node.op_type in _COMPUTES:
        return any(_may_be_negative(each) for each in node.inputs)
    return node.op_type in _NEGATIVE
