"""Rope type default: the frequencies of RoFormer, arXiv 2104.09864."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from rotary_export.rope.parameters import RopeParameters, compute_powers


@dataclass(frozen=True, kw_only=True)
class Default(RopeParameters):
    """Frequencies base ** (-2i / dim)."""

    rope_type = "default"
    aliases = ("mrope",)

    def compute_short_inv_freq(self) -> Tensor:
        """Compute base ** (-2i / dim), (R/2,)."""
        return 1.0 / compute_powers(self.base, self.dim)
