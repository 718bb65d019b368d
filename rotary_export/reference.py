"""Start here: the rotary maths in plain torch functions. No classes, no state.

Every other part of the package is checked against this file.

Notation used for tensor shapes:
    B: batch_size, N: number of heads, S: seq_len, H: head_dim,
    R: rotary_dim (even, <= H), P: any number of positions.

Position p rotates channel pair i by the angle p * inv_freq[i]. The pair (a, b) becomes
(a cos - b sin, b cos + a sin). Half layout (NeoX): pair i is channels (i, i + R/2).
Interleaved layout (GPT-J): pair i is channels (2i, 2i + 1).

Sources: RoFormer, arXiv 2104.09864; xPos, arXiv 2212.10554.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rotary_export.errors import RotaryExportError


def compute_inv_freq(dim: int, base: float = 10000.0, base_rescale_factor: float = 1.0) -> Tensor:
    """Compute the angle of each channel pair for one step of position.

    Args:
        dim: R, even and >= 4.
        base: Largest wavelength over 2 pi.
        base_rescale_factor: NTK-aware rescaling; base is multiplied by it to the power R / (R - 2).

    Returns:
        (R/2,), float32: base ** (-2i / R).
    """
    base = base * base_rescale_factor ** (dim / (dim - 2))
    return 1.0 / (base ** (torch.arange(0, dim, 2).float() / dim))  # (R/2,)


def compute_zeta(dim: int) -> Tensor:
    """Compute xPos's decay of each channel pair for `scale_base` steps of position.

    Args:
        dim: R.

    Returns:
        (R/2,), float32: (2i + 0.4 R) / (1.4 R), arXiv 2212.10554 with gamma = 0.4.
    """
    return (torch.arange(0, dim, 2) + 0.4 * dim) / (1.4 * dim)  # (R/2,)


def build_freqs(positions: Tensor, inv_freq: Tensor, interpolation_factor: float = 1.0) -> Tensor:
    """Build the angles of some positions, half-tiled.

    Positions and angles are float32 or wider, whatever the activations are: a bfloat16 position
    is wrong from 257 on.

    Args:
        positions: (P,), integer.
        inv_freq: (R/2,).
        interpolation_factor: Positions are divided by it, >= 1.

    Returns:
        (P, R) in inv_freq's dtype; columns i and i + R/2 are equal.
    """
    steps = positions.to(inv_freq.dtype) / interpolation_factor  # (P,)
    angles = steps[:, None] * inv_freq  # (P, R/2)
    return torch.cat((angles, angles), dim=-1)


def build_scale(positions: Tensor, center: Tensor, zeta: Tensor, scale_base: float) -> Tensor:
    """Build xPos's scale of some positions, half-tiled.

    Args:
        positions: (P,), integer; not divided by an interpolation factor.
        center: (), integer: the position whose scale is 1.
        zeta: (R/2,).
        scale_base: Positions per power of zeta.

    Returns:
        (P, R) in zeta's dtype: zeta ** ((positions - center) / scale_base).
    """
    power = (positions - center) / scale_base  # (P,)
    scale = zeta ** power.to(zeta.dtype)[:, None]  # (P, R/2)
    return torch.cat((scale, scale), dim=-1)


def rotate(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    scale: Tensor | None = None,
    *,
    interleaved: bool = False,
) -> Tensor:
    """Rotate the leading R channels of x; the tail is copied unchanged.

    Half types are computed in float32 and rounded once. In float32 these are the bits of
    `x * cos + rotate_half(x) * sin`, and with a scale of
    `(x * cos) * scale + (rotate_half(x) * sin) * scale`.

    Args:
        x: (..., S, H).
        cos: Broadcastable to (..., S, R/2); its last dimension determines R.
        sin: As `cos`.
        scale: As `cos`, or a number (0-d); None: no xPos.
        interleaved: True: pairs (2i, 2i + 1); False: pairs (i, i + R/2).

    Returns:
        As x, shape and dtype.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    rotary_dim = 2 * cos.shape[-1]
    head, tail = x[..., :rotary_dim].to(dtype), x[..., rotary_dim:]
    cos, sin = cos.to(dtype), sin.to(dtype)  # (..., S, R/2)

    if interleaved:
        a, b = head[..., 0::2], head[..., 1::2]  # (..., S, R/2)
    else:
        a, b = head[..., : rotary_dim // 2], head[..., rotary_dim // 2 :]  # (..., S, R/2)
    if scale is None:
        first = a * cos - b * sin
        second = b * cos + a * sin
    else:
        scale = scale.to(dtype)
        first = a * cos * scale - b * sin * scale
        second = b * cos * scale + a * sin * scale
    if interleaved:
        rotated = torch.stack((first, second), dim=-1).flatten(-2)  # (..., S, R)
    else:
        rotated = torch.cat((first, second), dim=-1)  # (..., S, R)
    return torch.cat((rotated.to(x.dtype), tail), dim=-1)


def apply_rotary_emb(
    x: Tensor, freqs: Tensor, scale: float | Tensor = 1.0, *, interleaved: bool = False
) -> Tensor:
    """Rotate x by the angles `freqs`, as a `RotaryEmbedding` returns them.

    A decoder with `start` cached tokens passes `freqs[start:start + n]` (and the same rows of
    `scale`). With xPos, queries are passed `scale` and keys `scale ** -1`.

    Args:
        x: (..., S, H), query or key.
        freqs: (S, R) or broadcastable to (..., S, R), half-tiled, R <= H; channels past R are
            copied.
        scale: A number, a 0-d tensor, or as `freqs`.
        interleaved: True: pairs (2i, 2i + 1); pair i has entry i of the first half of `freqs`.

    Returns:
        As x, shape and dtype. Half types are computed in float32 and rounded once.

    Raises:
        RotaryExportError: `freqs` has not one row per row of x, more columns than x, or an odd
            number of them; `scale` is neither a number nor shaped as `freqs`; x is not floating.
    """
    if x.dim() < 2 or freqs.dim() < 2 or not x.is_floating_point():
        raise RotaryExportError(
            "x must be floating and have 2 dimensions or more, as must freqs, "
            f"got x {str(x.dtype).removeprefix('torch.')} of shape {tuple(x.shape)}, "
            f"freqs of shape {tuple(freqs.shape)}"
        )
    if freqs.shape[-2] != x.shape[-2]:
        raise RotaryExportError(
            "freqs must have one row for each row of x, "
            f"got {freqs.shape[-2]} rows of freqs and {x.shape[-2]} of x"
        )
    rotary_dim = freqs.shape[-1]
    if rotary_dim % 2 or rotary_dim > x.shape[-1]:
        raise RotaryExportError(
            "rotary_dim must be even and <= head_dim, "
            f"got rotary_dim={rotary_dim}, head_dim={x.shape[-1]}"
        )
    freqs = freqs.to(torch.promote_types(freqs.dtype, torch.float32))
    # cos of the whole tensor, then its half: torch's vectorised cos and the scalar one, which it
    # uses for a strided tensor, may differ by an ulp.
    half = rotary_dim // 2
    cos, sin = freqs.cos()[..., :half], freqs.sin()[..., :half]  # (S, R/2)
    if not isinstance(scale, Tensor):
        scale = torch.full((), scale, dtype=freqs.dtype, device=freqs.device)
    if scale.dim() > 0:
        if scale.shape != freqs.shape:
            raise RotaryExportError(
                "scale must be a number or have the shape of freqs, "
                f"got {tuple(scale.shape)} and {tuple(freqs.shape)}"
            )
        scale = scale[..., :half]
    return rotate(x, cos, sin, scale, interleaved=interleaved)
