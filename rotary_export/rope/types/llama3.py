"""Rope type llama3: Llama 3.1's scaling by wavelength."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rotary_export.rope.fields import Entry
from rotary_export.rope.parameters import RopeParameters, StretchedRope, compute_powers


@dataclass(frozen=True, kw_only=True)
class Llama3(StretchedRope):
    """Short wavelengths are kept, long ones multiplied by factor, those between are blended.

    Attributes:
        original_max_position_embeddings: Positions before the model was made longer.
        low_freq_factor: The original length over it is where long wavelengths begin.
        high_freq_factor: The original length over it is where short wavelengths end.
    """

    rope_type = "llama3"
    required_keys = ("factor", "low_freq_factor", "high_freq_factor")

    original_max_position_embeddings: int
    low_freq_factor: float
    high_freq_factor: float

    @classmethod
    def read(cls, entry: Entry, **common: Any) -> RopeParameters:
        """Read the two ends of the blend."""
        own = entry.own
        low, high = own.number("low_freq_factor"), own.number("high_freq_factor")
        if high <= low:
            raise own.error("high_freq_factor", f"must be > low_freq_factor = {low:g}", high)
        return cls(
            **common,
            factor=own.number("factor"),
            original_max_position_embeddings=entry.read_original_length(),
            low_freq_factor=low,
            high_freq_factor=high,
        )

    def compute_short_inv_freq(self) -> Tensor:
        """Blend base ** (-2i / dim) and that over factor by wavelength, (R/2,)."""
        inv_freq = 1.0 / compute_powers(self.base, self.dim)
        length = self.original_max_position_embeddings
        low, high = self.low_freq_factor, self.high_freq_factor
        wavelength = 2 * math.pi / inv_freq
        is_long, is_short = wavelength > length / low, wavelength < length / high
        smooth = (length / wavelength - low) / (high - low)
        blended = (1 - smooth) * inv_freq / self.factor + smooth * inv_freq
        kept = torch.where(is_long, inv_freq / self.factor, inv_freq)
        return torch.where(is_long | is_short, kept, blended)
