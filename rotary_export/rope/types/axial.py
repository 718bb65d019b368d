"""Rope type axial: the rows and columns of an image, a part of the head for each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rotary_export.rope import families
from rotary_export.rope.fields import Entry
from rotary_export.rope.parameters import RopeParameters, compute_powers


@dataclass(frozen=True, kw_only=True)
class Axial(RopeParameters):
    """Positions of two or three axes, each with frequencies of its part of the head.

    Attributes:
        coordinates: Positions are coordinates in [-1, 1] (DINOv3).
    """

    rope_type = "axial"

    coordinates: bool = False

    @classmethod
    def find_dim(cls, entry: Entry) -> int:
        """Return the channels of one axis; of an even-odd layout those of all."""
        layout, head_dim = _find_layout(entry), entry.head_dim
        if layout == "three-axes" and head_dim >= 6:  # the rest of a head stays as it is
            return head_dim // 3 // 2 * 2
        if head_dim % 4:
            message = "must be a multiple of 4 for rope type axial"
            raise entry.own.error("head_dim", message, head_dim)
        return head_dim if layout == "even-odd" else head_dim // 2

    @classmethod
    def read(cls, entry: Entry, **common: Any) -> RopeParameters:
        """Read the layout, which is the family's."""
        common |= {"mrope_section": (), "axis_layout": _find_layout(entry)}
        return cls(**common, coordinates=entry.model_type in families.COORDINATES)

    @property
    def rotary_dim(self) -> int:
        """R, even: a part of the head for each axis."""
        return {"even-odd": 1, "three-axes": 3}.get(self.axis_layout, 2) * self.dim

    def compute_short_inv_freq(self) -> Tensor:
        """Compute the frequency of each column, (R/2,); the axes share them, but for even-odd."""
        if self.coordinates:
            shared = 1.0 / self.base ** torch.arange(0, 1, 2 / self.dim)
            return torch.cat((shared, shared))
        inv_freq = 1.0 / compute_powers(self.base, self.dim)
        if self.axis_layout == "even-odd":
            return torch.cat((inv_freq[0::2], inv_freq[1::2]))
        if self.axis_layout == "alternating":
            return inv_freq.repeat_interleave(2)
        return inv_freq.repeat(3 if self.axis_layout == "three-axes" else 2)


def _find_layout(entry: Entry) -> str:
    """Return the layout of a family; "rows-first" where the config names no family."""
    if entry.model_type and entry.model_type not in families.AXIAL:
        message = f"'axial' of model_type {entry.model_type!r} is not known"
        raise entry.own.error("rope_type", message, "axial")
    return families.AXIAL.get(entry.model_type, "rows-first")
