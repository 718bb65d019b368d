"""A model as a graph with dynamic sizes, and the model restored afterwards.

- `program.py`: `torch.export`, and an error where tracing specialises a size to a constant.
- `guards.py`: the conditions on sizes that hold for the traced graph only.
- `row_limits.py`: the sizes and ids at which a lookup finds a row.
- `condition_text.py`: writes these conditions as people do.
- `size_limits.py`: turns these conditions into limits, and into sizes to verify.
- `trace_patches.py`: what is replaced in a model while it is traced.
- `adapt/`: a traced program in the forms that torch.onnx translates and ONNX Runtime runs.
- `float32_tables.py`: computes in float32 what a model computes from positions in a half type.
- `traced_rotary.py`: runs the rotary nodes of a traced model, and what computes their tables.
- `snapshot.py`: restores modes, buffers, attributes and submodules.
"""
