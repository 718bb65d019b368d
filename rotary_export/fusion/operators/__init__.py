"""Attention and norms in ONNX's own operators, without the copies around them.

- `apply.py`: the rules, in the order in which they are applied.
- `attention.py`: keys and values as the cache holds them: not repeated, not joined before.
- `separate.py`: the opposite, for runtimes whose attention has no groups of heads.
- `reshapes.py`: reshapes that change nothing.
"""
