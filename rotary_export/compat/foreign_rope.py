"""The `RotaryEmbedding` of zeta and of x-transformers, recognised and called without importing it.

Their six arguments are those of `rotary_export.RotaryEmbedding`, and so are the two buffers.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

PACKAGES = {"zeta": "zetascale", "x_transformers": "x-transformers"}  # by module: on PyPI
_MODULES = (
    "zeta.nn.embeddings.rope",
    "zeta.structs.transformer",
    "x_transformers.x_transformers",
)


def is_foreign_rope(module: object) -> bool:
    """Whether a module is a `RotaryEmbedding` of theirs; a subclass may compute something else."""
    kind = type(module)
    return kind.__name__ == "RotaryEmbedding" and kind.__module__ in _MODULES


def read_arguments(module: Any) -> dict[str, Any]:
    """Return those arguments of the constructor that the module keeps, as numbers."""
    return {
        "interpolation_factor": float(getattr(module, "interpolation_factor", 1.0)),
        "scale_base": float(getattr(module, "scale_base", 512.0)),
    }


def compute_tables(module: Any, rows: int) -> tuple[Tensor, Tensor | None]:
    """Call a module of any release.

    Args:
        module: Of theirs.
        rows: Number of positions, from 0 on.

    Returns:
        freqs: (rows, dim).
        scale: As freqs; None without xPos.
    """
    with torch.no_grad():
        if hasattr(module, "forward_from_seq_len"):  # x-transformers from 1.26 on
            freqs, scale = module.forward_from_seq_len(rows)
        elif "device" in inspect.signature(module.forward).parameters:
            freqs, scale = module(rows, module.inv_freq.device)
        else:
            freqs, scale = module(rows)
    if not isinstance(scale, Tensor):
        return freqs.reshape(rows, -1).cpu(), None
    return freqs.reshape(rows, -1).cpu(), scale.reshape(rows, -1).cpu()
