"""An ONNX file that `fuse` wrote, or any other, where a model's bundle is asked for.

- `bundle.py`: `write_fused_bundle`: a fused file, its proof and its hashes in a folder.
- `describe.py`: what `verify`, `bench` and `deploy` need to know of a file's inputs.
"""
