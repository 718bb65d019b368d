"""`RopeParameters`: the base of every rope type. A type is one record, a file of `types/`.

The record contains the type's name and keys, how they are read, its formula, and whether its
frequencies depend on the length. Nothing about one type stands anywhere else in the package.

Notation as in `reference.py`; besides, A: number of axes of multimodal positions.

The operations, their order and their types are those of transformers, so that float32 results are
equal to the bit.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from rotary_export.rope.axes import assign_axes
from rotary_export.rope.fields import Entry


@dataclass(frozen=True, kw_only=True)
class RopeParameters(ABC):
    """One rotary embedding as a Hugging Face config describes it; `rope.read_rope` reads it.

    A subclass is a rope type. It adds the fields that its formula needs.

    Attributes:
        rope_type: The type's name, in configs and manifests.
        aliases: Other names of it in configs.
        required_keys: Keys without which an entry of the type is refused.
        requires_even_dim: Whether the formula is undefined for an odd `dim`.
        varies_past_boundary: With a `length_boundary`: whether each length past it has frequencies
            of its own. If not, all of them share a second set.
        coordinates: Positions are not ids but float coordinates in [-1, 1], of which 1 is half a
            turn of the fastest pair.
        softmax_factor: Attention multiplies its softmax scale by it; the tables don't contain it.
        base: Largest wavelength over 2 pi (`rope_theta`).
        head_dim: H.
        dim: The divisor of the exponents; rotary_dim is it, made even.
        max_position_embeddings: Positions of the trained model; 0: not in the config.
        mrope_section: Columns of each axis of multimodal positions; empty: one axis.
        axis_layout: Which axis each column has, see `axes.assign_axes`; empty: one axis.
    """

    rope_type: ClassVar[str]
    aliases: ClassVar[tuple[str, ...]] = ()
    required_keys: ClassVar[tuple[str, ...]] = ()
    requires_even_dim: ClassVar[bool] = False
    varies_past_boundary: ClassVar[bool] = False

    base: float
    head_dim: int
    dim: int
    max_position_embeddings: int
    mrope_section: tuple[int, ...] = ()
    axis_layout: str = ""

    # ---- the record of a type: override what differs

    @classmethod
    def find_dim(cls, entry: Entry) -> int:
        """Find the divisor of the exponents.

        Raises:
            RotaryExportError: The share of a head does not leave one.
        """
        return cls.check_dim(entry, int(entry.head_dim * entry.share))

    @classmethod
    def read(cls, entry: Entry, **common: Any) -> RopeParameters:
        """Read the type's own keys.

        Args:
            entry: Where they stand.
            common: The fields of `RopeParameters`, already read.

        Raises:
            RotaryExportError: A key is missing, or its value is impossible.
        """
        return cls(**common)

    @abstractmethod
    def compute_short_inv_freq(self) -> Tensor:
        """Compute the type's formula, (R/2,), float32; up to `length_boundary`, if it has one."""

    @property
    def length_boundary(self) -> int | None:
        """The longest length with the first frequencies; None: they depend on no length."""
        return None

    def compute_long_inv_freq(self, seq_len: int | Tensor) -> Tensor:
        """Compute the frequencies of a length past `length_boundary`; (R/2,), float32.

        Args:
            seq_len: An int, or an int64 tensor of shape (), which stays a tensor in a graph.
        """
        raise NotImplementedError(f"rope type {self.rope_type!r} has no length_boundary")

    def compute_attention_factor(self, seq_len: int | Tensor | None = None) -> float | Tensor:
        """Return the factor of cos and sin; a tensor only where it depends on a tensor.

        Args:
            seq_len: As in `compute_inv_freq`.
        """
        return 1.0

    @property
    def coordinates(self) -> bool:
        """Whether positions are coordinates; see the class."""
        return False

    @property
    def softmax_factor(self) -> float:
        """The factor of attention's softmax scale; see the class."""
        return 1.0

    @property
    def rotary_dim(self) -> int:
        """R, even: columns of a table, twice."""
        return self.dim + self.dim % 2

    @property
    def default_max_seq_len(self) -> int | None:
        """Rows of a table by default; None: not in the config."""
        return self.max_position_embeddings or None

    # ---- the same for every type

    @classmethod
    def check_dim(cls, entry: Entry, dim: int) -> int:
        """Return `dim`, or refuse it.

        Raises:
            RotaryExportError: It does not fit the head, or the formula is undefined for it.
        """
        if entry.share > 1 or dim + dim % 2 > entry.head_dim:
            raise entry.own.error(
                "partial_rotary_factor", f"must fit head_dim={entry.head_dim}", entry.share
            )
        if dim < 2 or (dim % 2 and cls.requires_even_dim):
            raise entry.own.error(
                "partial_rotary_factor",
                f"times head_dim={entry.head_dim} must be at least 2, and even for {cls.rope_type}",
                entry.share,
            )
        return dim

    def compute_inv_freq(self, seq_len: int | Tensor | None = None) -> Tensor:
        """Compute the angle of each channel pair for one step of position.

        Args:
            seq_len: The actual sequence length: an int, or an int64 tensor of shape (), which stays
                a tensor in a graph. Types with a `length_boundary` depend on it; None: the
                shortest.

        Returns:
            (R/2,), float32.
        """
        short, boundary = self.compute_short_inv_freq(), self.length_boundary
        if seq_len is None or boundary is None:
            return short
        if isinstance(seq_len, Tensor):
            long = self.compute_long_inv_freq(seq_len).to(seq_len.device)
            return torch.where(seq_len > boundary, long, short.to(seq_len.device))
        return self.compute_long_inv_freq(seq_len) if seq_len > boundary else short

    def find_axes(self) -> tuple[int, ...]:
        """Return which axis of the positions each column has, R/2 axes; empty: there is one.

        Raises:
            RotaryExportError: The sections don't fill the columns.
        """
        return assign_axes(self.axis_layout, self.mrope_section, self.rotary_dim // 2)

    def to_dict(self) -> dict[str, Any]:
        """Return the parameters as a manifest contains them; `rope_types.from_dict` reads them."""
        return {"rope_type": self.rope_type, **asdict(self)}


@dataclass(frozen=True, kw_only=True)
class StretchedRope(RopeParameters):
    """A rope type whose sequences are longer than the trained ones by one factor.

    Attributes:
        factor: How many times longer sequences may be.
    """

    factor: float


def compute_powers(base: float | Tensor, dim: int) -> Tensor:
    """Return base ** (2i / dim), (ceil(dim / 2),)."""
    device = base.device if isinstance(base, Tensor) else None
    powers: Tensor = base ** (torch.arange(0, dim, 2, device=device).float() / dim)
    return powers
