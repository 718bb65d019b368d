"""A model as a graph with dynamic sizes, and the model restored afterwards.

- `program.py`: `torch.export`, and an error where tracing specialises a size to a constant.
- `guards.py`: the conditions on sizes that hold for the traced graph only.
- `size_limits.py`: turns these conditions into limits, and into sizes to verify.
- `trace_patches.py`: what is replaced in a model while it is traced.
- `snapshot.py`: restores modes, buffers, attributes and submodules.
"""
