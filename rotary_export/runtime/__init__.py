"""Run a bundle. With ONNX Runtime this needs numpy and some ONNX Runtime wheel; no torch."""

from rotary_export.op.library import op_library_path
from rotary_export.runtime.load import load
from rotary_export.runtime.session import Session

__all__ = ["Session", "load", "op_library_path"]
