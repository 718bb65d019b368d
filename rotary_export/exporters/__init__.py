"""From a rotary embedding to a bundle: one file per format.

- `export.py`: `export`, which writes a bundle and proves it.
- `onnx_file.py`: writes an ONNX file weight by weight.
- `onnx.py`, `torchscript.py`, `program.py`, `aoti.py`: one format each.
"""
