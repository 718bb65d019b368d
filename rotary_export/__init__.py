"""rotary_export: take rotary position embeddings out of PyTorch, as one fused op, proven equal.

Names are handed on lazily: `import rotary_export.runtime` needs numpy alone.
"""

from importlib import import_module
from typing import Any

from rotary_export.package import __version__ as __version__

_HOMES = {
    "RotaryExportError": "rotary_export.errors",
    "RotaryEmbedding": "rotary_export.embedding",
    "RotaryQueryKey": "rotary_export.embedding",
    "apply_rotary_emb": "rotary_export.reference",
    "rotary_embedding": "rotary_export.op.torch_op",
    "export": "rotary_export.exporters.export",
    "Bundle": "rotary_export.exporters.export",
    "export_model": "rotary_export.models.export_model",
    "register_rotary": "rotary_export.models.find.candidates",
    "load": "rotary_export.runtime.load",
    "verify": "rotary_export.proof.model",
    "Report": "rotary_export.proof.parity",
    "fuse": "rotary_export.fusion.fuse",
    "FuseResult": "rotary_export.fusion.fuse",
}
__all__ = [*_HOMES]


def __getattr__(name: str) -> Any:
    if name == "runtime":  # `rotary_export.runtime.op_library_path()` needs no import of its own
        return import_module("rotary_export.runtime")
    if name not in _HOMES:
        raise AttributeError(f"module 'rotary_export' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
