"""The `RotaryEmbedding` of zeta or x-transformers as ours, by its state dict.

Their module keeps `inv_freq`, but not the base: the shortest decimal number that gives the same
bits is taken for it. The result of their forward decides the layout, and is compared with ours.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rotary_export.compat.foreign_rope import compute_tables, read_arguments
from rotary_export.embedding import RotaryEmbedding
from rotary_export.errors import RotaryExportError
from rotary_export.reference import compute_inv_freq

_ROWS = 9  # of the comparison
_BASE = 10000.0


def convert_foreign_rope(module: Any, interleaved: bool | None) -> tuple[RotaryEmbedding, bool]:
    """Return our module of their buffers, and the layout.

    Args:
        module: `is_foreign_rope` accepts it.
        interleaved: The layout; None: that of their freqs.

    Returns:
        The module, with a state dict that equals theirs to the bit; and whether pairs are
        (2i, 2i + 1).

    Raises:
        RotaryExportError: It is not float32, or computes something else than its buffers describe.
    """
    name = f"{type(module).__module__}.{type(module).__name__}"
    if module.inv_freq.dtype != torch.float32:
        raise RotaryExportError(f"module must be float32, got {module.inv_freq.dtype}")
    state = {key: value.detach().cpu() for key, value in module.state_dict().items()}
    rope = RotaryEmbedding(
        2 * len(state["inv_freq"]),
        "scale" in state,
        base=_find_base(state["inv_freq"]),
        **read_arguments(module),
    )
    rope.load_state_dict(state)
    theirs, ours = compute_tables(module, _ROWS), rope(_ROWS)
    layouts = [
        each
        for each in (False, True)
        if _is_close(theirs[0], _tile(ours[0], each))
        and (theirs[1] is None or _is_close(theirs[1], _tile(ours[1], each)))
    ]
    if not layouts:
        raise RotaryExportError(
            f"{name} computes other angles or scales than its inv_freq, scale, "
            "interpolation_factor and scale_base describe"
        )
    if interleaved is None and len(layouts) > 1:
        raise RotaryExportError(
            f"{name} does not show its layout, as all its frequencies are equal: pass interleaved"
        )
    return rope, layouts[0] if interleaved is None else interleaved


def _find_base(inv_freq: Tensor) -> float:
    """Return the shortest decimal base whose inv_freq has these bits, or the nearest base."""
    dim = 2 * len(inv_freq)
    last = float(inv_freq[-1])
    if not 0 < last < 1:  # not of the formula; it is loaded as it is
        return _BASE
    estimate: float = last ** (-dim / (dim - 2))
    for digits in range(17):
        base = float(f"{estimate:.{digits}e}")
        if torch.equal(compute_inv_freq(dim, base), inv_freq):
            return base
    return estimate


def _tile(table: Tensor, interleaved: bool) -> Tensor:
    """Return a half-tiled table (rows, dim) in the layout."""
    return table[:, : table.shape[1] // 2].repeat_interleave(2, -1) if interleaved else table


def _is_close(table: Tensor, expected: Tensor) -> bool:
    """Whether tables are equal but for the order of roundings."""
    return table.shape == expected.shape and torch.allclose(table, expected, rtol=1e-5, atol=0)
