"""What torch.onnx and onnxscript need not do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rotary_export.compat.onnx_decompositions import decompose_if_needed
from rotary_export.compat.onnx_promotion import promote_without_running
from rotary_export.compat.onnx_rewriter import match_by_operator
from rotary_export.compat.onnx_translations import reuse_translations
from rotary_export.compat.quiet import quiet_torch


@contextmanager
def skip_needless_work() -> Iterator[None]:
    """Let torch.onnx and onnxscript write the same file in less time, and quietly."""
    with (
        quiet_torch(),
        reuse_translations(),
        decompose_if_needed(),
        promote_without_running(),
        match_by_operator(),
    ):
        yield
