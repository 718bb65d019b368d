"""rotary_export: take rotary position embeddings out of PyTorch, as one fused op, proven equal.

Names are imported when they are first used: `import rotary_export.runtime` needs numpy alone.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from rotary_export.package import EXPORT_PACKAGES, describe_missing
from rotary_export.package import __version__ as __version__

if TYPE_CHECKING:
    from rotary_export.embedding import RotaryEmbedding as RotaryEmbedding
    from rotary_export.embedding import RotaryQueryKey as RotaryQueryKey
    from rotary_export.errors import RotaryExportError as RotaryExportError
    from rotary_export.exporters.export import Bundle as Bundle
    from rotary_export.exporters.export import export as export
    from rotary_export.fusion.fuse import fuse as fuse
    from rotary_export.fusion.result import FuseResult as FuseResult
    from rotary_export.models.export_model import export_model as export_model
    from rotary_export.models.find.candidates import register_rotary as register_rotary
    from rotary_export.models.prove.verify_model import verify_model as verify_model
    from rotary_export.op.torch_op import rotary_embedding as rotary_embedding
    from rotary_export.proof.report import Report as Report
    from rotary_export.proof.verify import verify as verify
    from rotary_export.reference import apply_rotary_emb as apply_rotary_emb
    from rotary_export.runtime.decoder.load_decoder import load_decoder as load_decoder
    from rotary_export.runtime.load import load as load

_LAZY_EXPORTS = {
    "RotaryExportError": "rotary_export.errors",
    "RotaryEmbedding": "rotary_export.embedding",
    "RotaryQueryKey": "rotary_export.embedding",
    "apply_rotary_emb": "rotary_export.reference",
    "rotary_embedding": "rotary_export.op.torch_op",
    "export": "rotary_export.exporters.export",
    "Bundle": "rotary_export.exporters.export",
    "export_model": "rotary_export.models.export_model",
    "verify_model": "rotary_export.models.prove.verify_model",
    "register_rotary": "rotary_export.models.find.candidates",
    "load": "rotary_export.runtime.load",
    "load_decoder": "rotary_export.runtime.decoder.load_decoder",
    "verify": "rotary_export.proof.verify",
    "Report": "rotary_export.proof.report",
    "fuse": "rotary_export.fusion.fuse",
    "FuseResult": "rotary_export.fusion.result",
}
__all__ = [*_LAZY_EXPORTS]


def __getattr__(name: str) -> Any:
    if name == "runtime":  # `rotary_export.runtime.op_library_path()` needs no import of its own
        return import_module("rotary_export.runtime")
    if name not in _LAZY_EXPORTS:
        raise AttributeError(f"module 'rotary_export' has no attribute {name!r}")
    try:
        return getattr(import_module(_LAZY_EXPORTS[name]), name)
    except ModuleNotFoundError as error:
        if error.name not in EXPORT_PACKAGES:
            raise
        message = describe_missing(f"rotary_export.{name}", error.name, "export")
        raise ModuleNotFoundError(message, name=error.name) from None


def __dir__() -> list[str]:
    return sorted([*globals(), *_LAZY_EXPORTS])
