"""A model as a graph with dynamic sizes, and the model restored afterwards.

- `program.py`: `torch.export`, and an error where tracing specialises a size to a constant.
- `guards.py`: the conditions on sizes that hold for the traced graph only.
- `size_limits.py`: turns these conditions into limits, and into sizes to verify.
- `trace_patches.py`: what is replaced in a model while it is traced.
- `onnx_program.py`: a traced program in the forms that torch.onnx translates rightly.
- `graph_edit.py`: new nodes in the graph of a traced program.
- `attention.py`: attention in the forms that torch.onnx translates and ONNX Runtime runs.
- `float32_tables.py`: computes in float32 what a model computes from positions in a half type.
- `traced_rotary.py`: runs the rotary nodes of a traced model, and what computes their tables.
- `snapshot.py`: restores modes, buffers, attributes and submodules.
"""
