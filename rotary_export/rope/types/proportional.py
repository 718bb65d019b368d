"""Rope type proportional: only the fastest pairs of a head turn (Gemma 4)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rotary_export.rope.fields import Entry
from rotary_export.rope.parameters import RopeParameters, compute_powers


@dataclass(frozen=True, kw_only=True)
class Proportional(RopeParameters):
    """Frequencies of the whole head, of which a share turns; the other pairs have angle 0.

    Attributes:
        rotated_pairs: Pairs that turn.
        factor: Their frequencies are divided by it.
    """

    rope_type = "proportional"
    requires_even_dim = True

    rotated_pairs: int
    factor: float = 1.0

    @classmethod
    def find_dim(cls, entry: Entry) -> int:
        """Return the whole head: the share decides which pairs turn."""
        return cls.check_dim(entry, entry.head_dim)

    @classmethod
    def read(cls, entry: Entry, **common: Any) -> RopeParameters:
        """Read the share and factor."""
        return cls(
            **common,
            rotated_pairs=int(entry.share * entry.head_dim // 2),
            factor=entry.own.number("factor", default=1.0),
        )

    def compute_short_inv_freq(self) -> Tensor:
        """Compute base ** (-2i / head_dim) / factor, then zeros, (R/2,)."""
        rotated = 1.0 / compute_powers(self.base, self.dim)[: self.rotated_pairs]
        still = torch.zeros(self.dim // 2 - self.rotated_pairs)
        return torch.cat((rotated, still)) / self.factor
