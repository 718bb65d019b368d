"""The rewrite rules, and the nodes that they write.

- `base.py`: what every rule does: it keeps what it fused, and why it refused.
- `apply.py`: the rules and passes, in order. A new rule is listed here.
- `primitives.py`: what the rules for primitives share.
- `add_products.py`: the sum, or the difference, of two products.
- `join_channels.py`: parts of a rotation, joined by Concat.
- `merge_pairs.py`: pairs, or complex numbers, merged into channels by Reshape.
- `onnx_node.py`: `ai.onnx::RotaryEmbedding`.
- `microsoft_node.py`: `com.microsoft::RotaryEmbedding`.
- `partial.py`: rotated channels, joined with the others.
- `casts.py`: casts around a rotation in half precision.
- `build.py`: the node and its tables.
- `join.py`: query and key become one node.
"""
