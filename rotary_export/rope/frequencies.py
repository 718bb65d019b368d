"""The rope types: how each turns a base into the angle of every channel pair. Pure functions.

Notation as in `reference.py`; besides, A: number of axes of multimodal positions.

The operations, their order and their types are those of transformers, so that float32 results are
equal to the bit. Sources: position interpolation, arXiv 2306.15595 (linear); YaRN, arXiv
2309.00071, with NTK (dynamic); LongRoPE, arXiv 2402.13753; Llama 3.1 (llama3).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from rotary_export.errors import RotaryExportError

ROPE_TYPES = (
    "default", "linear", "dynamic", "yarn", "longrope", "llama3", "proportional", "axial",
)  # fmt: skip
# How the columns of a table are dealt out to the axes of multimodal positions.
MROPE_LAYOUTS = ("chunked", "interleaved", "pairs-first")
# The same for the rows and columns of an image: rope type axial.
AXIAL_LAYOUTS = ("", "columns-first", "alternating", "even-odd", "three-axes")


@dataclass(frozen=True)
class RopeParameters:
    """One rotary embedding as a Hugging Face config describes it; `scaling.read_rope` reads it.

    Attributes:
        rope_type: One of ROPE_TYPES.
        base: Largest wavelength over 2 pi (`rope_theta`).
        head_dim: H.
        dim: What the exponents are divided by; rotary_dim is it, made even.
        max_position_embeddings: Positions of the trained model; dynamic grows past it.
        factor: How many times longer; linear, dynamic, yarn, llama3, proportional.
        original_max_position_embeddings: Positions before it was made longer; yarn, llama3 and
            longrope, which switches past it.
        attention_factor: Cos and sin are multiplied by it.
        long_attention_factor: The same past longrope's switch, where it differs there.
        softmax_factor: Attention multiplies its softmax scale by it (DeepSeek's mscale); the tables
            don't hold it.
        beta_fast: Rotations from which yarn keeps the frequency.
        beta_slow: Rotations to which yarn divides it.
        truncate: Whether yarn rounds the ends of its ramp.
        low_freq_factor: Of llama3.
        high_freq_factor: Of llama3.
        short_factor: Of longrope, R/2 divisors.
        long_factor: Of longrope past its switch, R/2 divisors.
        rotated_pairs: Pairs that proportional rotates; the others have angle 0.
        mrope_section: Columns of each axis of multimodal positions; empty: one axis.
        mrope_layout: One of MROPE_LAYOUTS, or empty; for axial one of AXIAL_LAYOUTS.
        coordinates: Positions are no ids but float coordinates in [-1, 1], of which 1 is half a
            turn of the fastest pair (DINOv3).
    """

    rope_type: str
    base: float
    head_dim: int
    dim: int
    max_position_embeddings: int
    factor: float = 1.0
    original_max_position_embeddings: int = 0
    attention_factor: float = 1.0
    long_attention_factor: float | None = None
    softmax_factor: float = 1.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    low_freq_factor: float = 1.0
    high_freq_factor: float = 1.0
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()
    rotated_pairs: int = 0
    mrope_section: tuple[int, ...] = ()
    mrope_layout: str = ""
    coordinates: bool = False

    @property
    def rotary_dim(self) -> int:
        """R, even: columns of a table, twice."""
        if self.rope_type == "axial":  # a part of the head for each axis
            return {"even-odd": 1, "three-axes": 3}.get(self.mrope_layout, 2) * self.dim
        return self.dim + self.dim % 2

    @property
    def switch_length(self) -> int | None:
        """The longest length of the first frequencies; None: there are no others."""
        if self.rope_type == "dynamic":
            return self.max_position_embeddings
        return self.original_max_position_embeddings if self.rope_type == "longrope" else None


def compute_inv_freq(parameters: RopeParameters, seq_len: int | Tensor | None = None) -> Tensor:
    """Compute the angle of each channel pair for one step of position.

    Args:
        parameters: What the config says.
        seq_len: The length that is there: an int, or an int64 tensor of shape (), which stays a
            tensor in a graph. Dynamic and longrope depend on it; None: the shortest.

    Returns:
        (R/2,), float32.
    """
    p = parameters
    if p.rope_type == "dynamic":
        if isinstance(seq_len, Tensor):
            first = compute_inv_freq(p).to(seq_len.device)
            return torch.where(
                seq_len > p.max_position_embeddings, compute_dynamic_inv_freq(p, seq_len), first
            )
        length = max(seq_len or 0, p.max_position_embeddings)
        return 1.0 / _compute_powers(_grow_base(p, length), p.dim)
    if p.rope_type == "longrope":
        short, long = (
            1.0 / (torch.tensor(divisors) * _compute_powers(p.base, p.dim))
            for divisors in (p.short_factor, p.long_factor)
        )
        limit = p.original_max_position_embeddings
        if isinstance(seq_len, Tensor):
            device = seq_len.device
            return torch.where(seq_len > limit, long.to(device), short.to(device))
        return long if (seq_len or 0) > limit else short
    if p.rope_type == "yarn":
        return _compute_yarn(p)
    if p.rope_type == "llama3":
        return _compute_llama3(p)
    if p.rope_type == "proportional":
        rotated = 1.0 / _compute_powers(p.base, p.dim)[: p.rotated_pairs]
        still = torch.zeros(p.dim // 2 - p.rotated_pairs)
        return torch.cat((rotated, still)) / p.factor
    if p.coordinates:
        shared = 1.0 / p.base ** torch.arange(0, 1, 2 / p.dim)
        return torch.cat((shared, shared))
    inv_freq = 1.0 / _compute_powers(p.base, p.dim)
    if p.rope_type == "axial":
        return _deal_out_axial(inv_freq, p.mrope_layout)
    return inv_freq / p.factor if p.rope_type == "linear" else inv_freq


def _deal_out_axial(inv_freq: Tensor, layout: str) -> Tensor:
    """Return the frequency of each column; the axes share them, but for even-odd."""
    if layout == "even-odd":
        return torch.cat((inv_freq[0::2], inv_freq[1::2]))
    if layout == "alternating":
        return inv_freq.repeat_interleave(2)
    return inv_freq.repeat(3 if layout == "three-axes" else 2)


def compute_dynamic_inv_freq(parameters: RopeParameters, seq_len: Tensor) -> Tensor:
    """Compute dynamic's frequencies (NTK) past max_position_embeddings: the base grows.

    Args:
        parameters: Of type dynamic.
        seq_len: (), int64; below max_position_embeddings the result is that of the limit, to a few
            ulp.

    Returns:
        (R/2,), float32.
    """
    length = seq_len.clamp(min=parameters.max_position_embeddings)
    return 1.0 / _compute_powers(_grow_base(parameters, length), parameters.dim)


def _compute_powers(base: float | Tensor, dim: int) -> Tensor:
    """Return base ** (2i / dim), (ceil(dim / 2),)."""
    device = base.device if isinstance(base, Tensor) else None
    powers: Tensor = base ** (torch.arange(0, dim, 2, device=device).float() / dim)
    return powers


def _grow_base(p: RopeParameters, length: int | Tensor) -> float | Tensor:
    stretch = (p.factor * length / p.max_position_embeddings) - (p.factor - 1)
    grown: float | Tensor = p.base * stretch ** (p.dim / (p.dim - 2))
    return grown


def _compute_yarn(p: RopeParameters) -> Tensor:
    """Keep the fast pairs, divide the slow ones by factor, with a ramp between them."""
    powers = _compute_powers(p.base, p.dim)
    low, high = _find_yarn_ramp(p)
    steps = torch.arange(p.dim // 2).float()
    keep = 1 - ((steps - low) / (high - low)).clamp(0, 1)  # (R/2,)
    return 1.0 / (p.factor * powers) * (1 - keep) + 1.0 / powers * keep


def _find_yarn_ramp(p: RopeParameters) -> tuple[float, float]:
    """Return the pairs that turn beta_fast and beta_slow times in the original length."""

    def find_pair(rotations: float) -> float:
        wavelength = p.original_max_position_embeddings / (rotations * 2 * math.pi)
        return (p.dim * math.log(wavelength)) / (2 * math.log(p.base))

    low, high = find_pair(p.beta_fast), find_pair(p.beta_slow)
    if p.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, p.dim - 1)
    return low, high + 0.001 if low == high else high


def _compute_llama3(p: RopeParameters) -> Tensor:
    """Keep short wavelengths, divide long ones by factor, blend between."""
    inv_freq = 1.0 / _compute_powers(p.base, p.dim)
    length, low, high = (
        p.original_max_position_embeddings,
        p.low_freq_factor,
        p.high_freq_factor,
    )
    wavelength = 2 * math.pi / inv_freq
    is_long, is_short = wavelength > length / low, wavelength < length / high
    smooth = (length / wavelength - low) / (high - low)
    blended = (1 - smooth) * inv_freq / p.factor + smooth * inv_freq
    kept = torch.where(is_long, inv_freq / p.factor, inv_freq)
    return torch.where(is_long | is_short, kept, blended)


def compute_attention_factor(
    parameters: RopeParameters, seq_len: int | Tensor | None = None
) -> float | Tensor:
    """Return what cos and sin are multiplied by; a tensor only where it depends on a tensor.

    Args:
        parameters: What the config says.
        seq_len: As in `compute_inv_freq`.
    """
    short, long = parameters.attention_factor, parameters.long_attention_factor
    if long is None or seq_len is None:
        return short
    is_long = seq_len > parameters.original_max_position_embeddings
    if isinstance(is_long, Tensor):
        return torch.where(is_long, long, short)
    return long if is_long else short


def compute_mscale(factor: float, mscale: float = 1.0) -> float:
    """Return yarn's growth of attention with the length: 0.1 mscale ln(factor) + 1."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def find_axes(parameters: RopeParameters) -> tuple[int, ...]:
    """Say which axis of the positions each column of a table takes (M-RoPE, 2-D vision).

    "chunked": the sections one after the other, section j from axis j mod 3 (Qwen2-VL).
    "interleaved": axis 0, but for columns 1, 4, ... below 3 * section[1], which take axis 1, and
    2, 5, ... below 3 * section[2], which take axis 2 (Qwen3-VL). "pairs-first": axes 1, 2, 1, 2,
    ..., then axis 0 (Ernie 4.5 VL). An axial embedding takes axis 0, the rows of an image, for the
    first half of its columns, axis 1 for the second; "columns-first" the other way round (Llama 4);
    "alternating": axes 1, 0, 1, 0, ... (Kimi); "even-odd": as without a name, of the even
    frequencies and of the odd ones (Pixtral); "three-axes": a third each (MiniMax M3 VL).

    Args:
        parameters: What the config says.

    Returns:
        R/2 axes; empty: positions have one axis.

    Raises:
        RotaryExportError: The sections don't fill the columns.
    """
    half = parameters.rotary_dim // 2
    section, layout = parameters.mrope_section, parameters.mrope_layout
    if parameters.rope_type == "axial":
        return _find_axial_axes(layout, half)
    if not section:
        return ()
    if len(section) != 3:
        raise RotaryExportError(f"mrope_section must have 3 sections, got {list(section)}")
    if layout == "chunked":
        axes = [j % 3 for j, size in enumerate(section) for _ in range(size)]
    elif layout == "interleaved":
        axes = [0] * half
        for axis in (1, 2):
            for column in range(axis, min(3 * section[axis], half), 3):
                axes[column] = axis
    elif layout == "pairs-first":
        axes = [1, 2] * section[0] + [0] * section[2]
    else:
        raise RotaryExportError(
            f"mrope_layout must be one of {', '.join(MROPE_LAYOUTS)}, got {layout!r}"
        )
    if len(axes) != half or sum(section) != half:
        raise RotaryExportError(
            f"mrope_section must sum to rotary_dim / 2 = {half}, got {list(section)}"
        )
    return tuple(axes)


def _find_axial_axes(layout: str, half: int) -> tuple[int, ...]:
    if layout not in AXIAL_LAYOUTS:
        raise RotaryExportError(
            f"mrope_layout of rope type axial must be one of {AXIAL_LAYOUTS}, got {layout!r}"
        )
    if layout == "alternating":
        return (1, 0) * (half // 2)
    order = {"columns-first": (1, 0), "three-axes": (0, 1, 2)}.get(layout, (0, 1))
    return tuple(axis for axis in order for _ in range(half // len(order)))
