"""Run a bundle. With ONNX Runtime this needs numpy and some ONNX Runtime wheel; no torch.

- `load.py`: `load`, from a folder to a session.
- `decoder/`: `load_decoder`, which generates tokens.
- `session.py`: what every session does: checked inputs, numpy or torch.
- `ort.py`, `torch_runtime.py`, `reference_session.py`: sessions of one runtime each.
- `torch_files.py`: opens torch's files, and refuses what it can before torch runs it.
- `providers.py`: execution providers, and when the op library is registered.
- `compiled.py`: which machines run a compiled graph.
- `onnx_file.py`: a plain `.onnx` file, described as the graph of a bundle.
- `ways.py`: every way to run a graph, listed once.
- `tensors.py`: between torch tensors and numpy arrays.
"""

from rotary_export.op.library import op_library_path
from rotary_export.runtime.load import load
from rotary_export.runtime.session import Session

__all__ = ["Session", "load", "op_library_path"]
