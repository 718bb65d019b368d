"""Rope type linear: position interpolation, arXiv 2306.15595."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from rotary_export.rope.fields import Entry
from rotary_export.rope.parameters import RopeParameters, StretchedRope, compute_powers


@dataclass(frozen=True, kw_only=True)
class Linear(StretchedRope):
    """Every frequency divided by one factor."""

    rope_type = "linear"
    required_keys = ("factor",)

    @classmethod
    def read(cls, entry: Entry, **common: Any) -> RopeParameters:
        """Read factor."""
        return cls(**common, factor=entry.own.number("factor"))

    def compute_short_inv_freq(self) -> Tensor:
        """Compute base ** (-2i / dim) / factor, (R/2,)."""
        return 1.0 / compute_powers(self.base, self.dim) / self.factor
