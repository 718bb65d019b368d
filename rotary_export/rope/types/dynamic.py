"""Rope type dynamic: NTK-aware scaling that follows the length, arXiv 2309.00071."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from rotary_export.rope import families
from rotary_export.rope.fields import Entry
from rotary_export.rope.parameters import RopeParameters, StretchedRope, compute_powers
from rotary_export.rope.types.default import Default


@dataclass(frozen=True, kw_only=True)
class Dynamic(StretchedRope):
    """The base grows with the length, past max_position_embeddings."""

    rope_type = "dynamic"
    aliases = ("xdrope",)
    varies_past_boundary = True

    @classmethod
    def read(cls, entry: Entry, **common: Any) -> RopeParameters:
        """Read factor; with HunYuan's alpha the base is fixed, so the type is default."""
        dim = common["dim"]
        if dim <= 2:
            message = "must leave a rotary_dim > 2 for dynamic"
            raise entry.own.error("partial_rotary_factor", message, dim)
        if entry.own.get("alpha"):
            stretch = entry.own.number("alpha") ** (dim / (dim - 2))
            return Default(**common | {"base": common["base"] * stretch})
        common["max_position_embeddings"] = entry.top.count(*families.LENGTH_KEYS)
        return cls(**common, factor=entry.own.number("factor"))

    @property
    def length_boundary(self) -> int:
        """The trained length."""
        return self.max_position_embeddings

    @property
    def default_max_seq_len(self) -> int:
        """The config has the length before it is made longer; factor times that."""
        return int(self.factor * self.max_position_embeddings)

    def compute_short_inv_freq(self) -> Tensor:
        """Compute the frequencies of the trained length, (R/2,)."""
        return 1.0 / compute_powers(self._grow_base(self.max_position_embeddings), self.dim)

    def compute_long_inv_freq(self, seq_len: int | Tensor) -> Tensor:
        """Compute the frequencies of one length, (R/2,); at the boundary to a few ulp."""
        if isinstance(seq_len, Tensor):
            seq_len = seq_len.clamp(min=self.max_position_embeddings)
        return 1.0 / compute_powers(self._grow_base(seq_len), self.dim)

    def _grow_base(self, length: int | Tensor) -> float | Tensor:
        stretch = (self.factor * length / self.max_position_embeddings) - (self.factor - 1)
        grown: float | Tensor = self.base * stretch ** (self.dim / (self.dim - 2))
        return grown
