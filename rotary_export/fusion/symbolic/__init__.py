"""What each channel of a value is computed from, and whether that is a rotation.

- `polynomials.py`: channels as polynomials of symbols.
- `channels.py`: `Tracer`, which computes the channels of a value.
- `operators.py`: the operators that are understood, each with its handler.
- `handler.py`: what a handler accepts and returns.
- `elementwise.py`: handlers of Add, Mul, Neg, Cos, Cast, ...
- `movement.py`: handlers of Slice, Split, Concat, Gather, Reshape, Transpose, ...
- `shapes.py`: sizes that ONNX's shape inference leaves open.
- `pairs.py`: which channels are rotated together, and whether two of them are one rotation.
- `rotation.py`: the checks that recognise a rotation.
- `refusal.py`: why a value is not one, and which check decided.
- `nearest.py`: the nearest rotation that a value could have been.
"""
