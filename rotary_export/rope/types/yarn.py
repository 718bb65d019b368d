"""Rope type yarn: YaRN, arXiv 2309.00071."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rotary_export.errors import RotaryExportError
from rotary_export.rope.fields import Entry
from rotary_export.rope.parameters import RopeParameters, compute_powers


@dataclass(frozen=True, kw_only=True)
class Yarn(RopeParameters):
    """Fast pairs keep their frequency, slow ones are divided by factor, with a ramp between them.

    Attributes:
        factor: How many times longer sequences may be.
        original_max_position_embeddings: Positions before the model was made longer.
        attention_factor: Cos and sin are multiplied by it.
        softmax_factor: DeepSeek's mscale, which multiplies the softmax scale.
        beta_fast: Rotations from which a pair keeps its frequency.
        beta_slow: Rotations to which it is divided.
        truncate: Whether the ends of the ramp are rounded to whole pairs.
    """

    rope_type = "yarn"
    requires_even_dim = True

    factor: float
    original_max_position_embeddings: int
    attention_factor: float = 1.0
    softmax_factor: float = 1.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True

    @classmethod
    def read(cls, entry: Entry, **common: Any) -> RopeParameters:
        """Read the ramp; without an attention factor it is that of YaRN, or of DeepSeek."""
        own, name = entry.own, "original_max_position_embeddings"
        if own.get("factor") is None and own.get(name) is None and entry.top.get(name) is None:
            raise RotaryExportError(
                f"rope type 'yarn' needs factor or {name}, the config has neither"
            )
        original = entry.read_original_length()
        factor = entry.read_ratio(original)
        mscale, all_dim = (
            own.number(name, default=1.0) if own.get(name) else 0.0
            for name in ("mscale", "mscale_all_dim")
        )
        attention = compute_mscale(factor)
        if mscale and all_dim:
            attention = compute_mscale(factor, mscale) / compute_mscale(factor, all_dim)
        truncate = own.get("truncate")
        if truncate not in (None, True, False):
            raise own.error("truncate", "must be true or false", truncate)
        return cls(
            **common,
            factor=factor,
            original_max_position_embeddings=original,
            attention_factor=own.number("attention_factor", default=attention),
            softmax_factor=compute_mscale(factor, all_dim) ** 2 if all_dim else 1.0,
            beta_fast=own.number("beta_fast", default=32.0),
            beta_slow=own.number("beta_slow", default=1.0),
            truncate=truncate is not False,
        )

    def compute_attention_factor(self, seq_len: int | Tensor | None = None) -> float | Tensor:
        """Return the factor of cos and sin, at every length."""
        return self.attention_factor

    def compute_short_inv_freq(self) -> Tensor:
        """Blend base ** (-2i / dim) and that over factor, (R/2,)."""
        powers = compute_powers(self.base, self.dim)
        low, high = self._find_ramp()
        steps = torch.arange(self.dim // 2).float()
        keep = 1 - ((steps - low) / (high - low)).clamp(0, 1)  # (R/2,)
        return 1.0 / (self.factor * powers) * (1 - keep) + 1.0 / powers * keep

    def _find_ramp(self) -> tuple[float, float]:
        """Return the pairs that turn beta_fast and beta_slow times in the original length."""
        low, high = self._find_pair(self.beta_fast), self._find_pair(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, self.dim - 1)
        return low, high + 0.001 if low == high else high

    def _find_pair(self, rotations: float) -> float:
        wavelength = self.original_max_position_embeddings / (rotations * 2 * math.pi)
        return (self.dim * math.log(wavelength)) / (2 * math.log(self.base))


def compute_mscale(factor: float, mscale: float = 1.0) -> float:
    """Return yarn's growth of attention with the length: 0.1 mscale ln(factor) + 1."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0
