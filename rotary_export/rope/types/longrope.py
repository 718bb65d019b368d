"""Rope type longrope: LongRoPE, arXiv 2402.13753."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rotary_export.rope.fields import Entry
from rotary_export.rope.parameters import RopeParameters, compute_powers


@dataclass(frozen=True, kw_only=True)
class Longrope(RopeParameters):
    """Each pair has a divisor for short lengths and one for long ones.

    Attributes:
        original_max_position_embeddings: The longest short length.
        short_factor: R/2 divisors.
        long_factor: R/2 divisors of long lengths.
        attention_factor: Cos and sin are multiplied by it.
        long_attention_factor: The same of long lengths; None: as of short ones.
    """

    rope_type = "longrope"
    aliases = ("su",)
    required_keys = ("short_factor", "long_factor")
    requires_even_dim = True

    original_max_position_embeddings: int
    short_factor: tuple[float, ...]
    long_factor: tuple[float, ...]
    attention_factor: float = 1.0
    long_attention_factor: float | None = None

    @classmethod
    def read(cls, entry: Entry, **common: Any) -> RopeParameters:
        """Read both sets; without an attention factor it follows from the ratio of the lengths."""
        own, half = entry.own, common["dim"] // 2
        original = entry.read_original_length()
        if original < 2:
            raise own.error("original_max_position_embeddings", "must be >= 2", original)
        ratio = entry.read_ratio(original)
        attention = math.sqrt(1 + math.log(ratio) / math.log(original)) if ratio > 1 else 1.0
        attention, long_attention = own.number("attention_factor", default=attention), None
        short_factor, long_factor = (
            own.numbers(name, half) for name in ("short_factor", "long_factor")
        )
        if own.get("short_mscale") is not None or own.get("long_mscale") is not None:
            # Phi-3.5-MoE
            attention, long_attention = own.number("short_mscale"), own.number("long_mscale")
        return cls(
            **common,
            original_max_position_embeddings=original,
            short_factor=short_factor,
            long_factor=long_factor,
            attention_factor=attention,
            long_attention_factor=long_attention,
        )

    @property
    def length_boundary(self) -> int:
        """The longest short length."""
        return self.original_max_position_embeddings

    def compute_short_inv_freq(self) -> Tensor:
        """Compute base ** (-2i / dim) / short_factor, (R/2,)."""
        return 1.0 / (torch.tensor(self.short_factor) * compute_powers(self.base, self.dim))

    def compute_long_inv_freq(self, seq_len: int | Tensor) -> Tensor:
        """Compute base ** (-2i / dim) / long_factor, (R/2,), of every long length."""
        return 1.0 / (torch.tensor(self.long_factor) * compute_powers(self.base, self.dim))

    def compute_attention_factor(self, seq_len: int | Tensor | None = None) -> float | Tensor:
        """Return the factor of cos and sin; a tensor only where it depends on a tensor."""
        short, long = self.attention_factor, self.long_attention_factor
        if long is None or seq_len is None:
            return short
        is_long = seq_len > self.original_max_position_embeddings
        if isinstance(is_long, Tensor):
            return torch.where(is_long, long, short)
        return long if is_long else short
