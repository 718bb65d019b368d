"""The oracle, eager's arithmetic, and comparisons that name the worst element.

`compute_expected` is the oracle: the rotation in float64 (long double for double).
`compute_eager` is eager PyTorch's arithmetic: `x * cos + rotate_half(x) * sin` in float32, or in
float64 for double; half types are rounded once, at the end. Neither shares code with the package.
`assert_same_bits` compares bits, not values; only NaNs may differ in their bits.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

SAME_SIZE_INTS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
# smallest normal exponent, bits after the leading one
FORMATS = {
    torch.float16: (-14, 10),
    torch.bfloat16: (-126, 7),
    torch.float32: (-126, 23),
    torch.float64: (-1022, 52),
}
Tensors = dict[str, Tensor]


def rotate_eagerly(
    x: Tensor, cos: Tensor, sin: Tensor, scale: Tensor | None, interleaved: bool
) -> Tensor:
    """Rotate (B, N, S, H) `x` by tables of shape (B or 1, S, R/2), rounding once at the end."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32

    def widen(table: Tensor) -> Tensor:
        if interleaved:
            return table.to(dtype).repeat_interleave(2, -1)[:, None]
        return torch.cat((table, table), -1).to(dtype)[:, None]

    rotary_dim = 2 * cos.shape[-1]
    rotated = x[..., :rotary_dim].to(dtype)
    if interleaved:
        pairs = torch.stack((-rotated[..., 1::2], rotated[..., ::2]), -1).flatten(-2)
    else:
        first, second = rotated.chunk(2, -1)
        pairs = torch.cat((-second, first), -1)
    if scale is None:
        y = rotated * widen(cos) + pairs * widen(sin)
    else:
        y = (rotated * widen(cos)) * widen(scale) + (pairs * widen(sin)) * widen(scale)
    return torch.cat((y.to(x.dtype), x[..., rotary_dim:]), -1)


def _select_rows(inputs: Tensors) -> list[Tensor | None]:
    """Return cos, sin and scale of (B or 1, S, R/2)."""
    tables = [inputs.get(name) for name in ("cos_cache", "sin_cache", "scale_cache")]
    ids = inputs.get("position_ids")
    if ids is None:
        return tables
    rows = ids if ids.dim() == 2 else (ids + torch.arange(inputs["X"].shape[2]))[None]
    return [None if table is None else table[rows] for table in tables]


def compute_eager(inputs: Tensors, interleaved: bool) -> list[Tensor]:
    """Return Y, and key_out if there is a key, for 4-D inputs."""
    cos, sin, scale = _select_rows(inputs)
    assert cos is not None
    assert sin is not None
    outputs = [rotate_eagerly(inputs["X"], cos, sin, scale, interleaved)]
    if "key" in inputs:
        wide = torch.float64 if inputs["X"].dtype == torch.float64 else torch.float32
        inverse = None if scale is None else scale.to(wide) ** -1
        outputs.append(rotate_eagerly(inputs["key"], cos, sin, inverse, interleaved))
    return outputs


class Expected(NamedTuple):
    """What an output should be, and its ulp at the largest magnitude of the head vector."""

    value: np.ndarray
    ulp: np.ndarray


def compute_expected(inputs: Tensors, interleaved: bool) -> list[Expected]:
    """Return Y, and key_out if there is a key, for 4-D inputs: complex products of type `wide`."""
    x_type = inputs["X"].dtype
    wide = np.longdouble if x_type == torch.float64 else np.float64
    tables = [None if t is None else t.double().numpy().astype(wide) for t in _select_rows(inputs)]
    cos, sin, scale = tables
    turn = (cos + 1j * sin)[:, None]
    size = np.ones((), wide) if scale is None else scale[:, None]
    expected = []
    for name, factor in (("X", turn * size), ("key", turn / size)):
        if name not in inputs:
            continue
        y = inputs[name].double().numpy().astype(wide)
        half = turn.shape[-1]
        last = 2 * half
        first, second = (
            (slice(0, last, 2), slice(1, last, 2))
            if interleaved
            else (slice(0, half), slice(half, last))
        )
        pair = (y[..., first] + 1j * y[..., second]) * factor
        y[..., first], y[..., second] = pair.real, pair.imag
        lowest, bits = FORMATS[x_type]
        _, exponent = np.frexp(np.abs(y).max(-1, keepdims=True))
        ulp = np.ldexp(np.ones((), wide), np.maximum(exponent - 1, lowest) - bits)
        expected.append(Expected(y, np.broadcast_to(ulp, y.shape)))
    return expected


# ---- comparisons


def assert_same_bits(got: Tensor, want: Tensor, what: object = "") -> None:
    assert got.dtype == want.dtype, what
    assert got.shape == want.shape, what
    ints = SAME_SIZE_INTS[got.element_size()]
    got, want = got.detach().contiguous(), want.detach().contiguous()
    differ = (got.view(ints) != want.view(ints)) & ~(got.isnan() & want.isnan())
    if differ.any():
        worst = tuple(torch.nonzero(differ)[0].tolist())
        pytest.fail(
            f"{what}: {int(differ.sum())} differ, first {worst}: {got[worst]} {want[worst]}"
        )


def assert_within(got: Tensor, expected: Expected, max_ulp: float, what: object = "") -> None:
    assert tuple(got.shape) == expected.value.shape, what
    error = np.abs(got.detach().double().numpy() - expected.value) / expected.ulp
    if not (error <= max_ulp).all():
        error[np.isnan(error)] = np.inf
        worst = np.unravel_index(int(error.argmax()), error.shape)
        pytest.fail(
            f"{what}: {error[worst]:.3g} ulp at {tuple(int(i) for i in worst)}, "
            f"{max_ulp} allowed: {got[tuple(worst)]} {expected.value[worst]}"
        )
