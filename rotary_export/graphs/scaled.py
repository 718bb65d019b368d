"""The kind of rope that `ScaledRotaryEmbedding` is: a Hugging Face rope type."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from rotary_export.bundle.manifest import TensorInfo
from rotary_export.errors import RotaryExportError
from rotary_export.graphs.static import ComputedStatic, StoredStatic
from rotary_export.rope import RopeParameters, ScaledRotaryEmbedding
from rotary_export.rope.rope_types import from_dict
from rotary_export.rope.scaled_query_key import ComputedQueryKey, StoredQueryKey, stores_tables


class ScaledTables(ScaledRotaryEmbedding):
    """Cos and sin of positions 0 .. seq_len - 1 as a graph of static shapes."""

    def forward(self, seq_len: Tensor) -> tuple[Tensor, Tensor]:
        """Compute (max_seq_len, R/2) tables; rows at or past seq_len, (), are the identity."""
        assert self.max_seq_len is not None
        length = seq_len.clamp(0, self.max_seq_len)
        positions = torch.arange(self.max_seq_len, device=seq_len.device)
        cos, sin = self.build_tables(positions[None], length)
        keep = (positions < length)[:, None]  # (max_seq_len, 1)
        return torch.where(keep, cos[0], 1.0), torch.where(keep, sin[0], 0.0)


@dataclass(frozen=True)
class ScaledRope:
    """A `ScaledRotaryEmbedding`; see `kinds.RopeKind`.

    Attributes:
        parameters: Its rope type.
    """

    kind: ClassVar[str] = "scaled"
    key: ClassVar[str] = "rope"

    parameters: RopeParameters

    @classmethod
    def from_module(cls, module: ScaledRotaryEmbedding) -> Self:
        """Read the parameters of a module."""
        return cls(module.rope_parameters)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Read the parameters in a manifest; TypeError if something is missing or unknown."""
        return cls(from_dict(values))

    def to_dict(self) -> dict[str, Any]:
        """Return the parameters, with the name of the rope type."""
        return self.parameters.to_dict()

    @property
    def rotary_dim(self) -> int:
        """R."""
        return self.parameters.rotary_dim

    @property
    def default_head_dim(self) -> int:
        """The config's head, of which a share may be rotated."""
        return self.parameters.head_dim

    @property
    def num_axes(self) -> int:
        """Multimodal positions have two or three."""
        return max(self.parameters.find_axes(), default=0) + 1

    @property
    def uses_xpos(self) -> bool:
        """Rope types have no scale: the attention factor is in the tables."""
        return False

    def find_max_seq_len(self, module: ScaledRotaryEmbedding) -> int | None:
        """Return the module's, or that of the config."""
        if module.max_seq_len is not None:
            return module.max_seq_len
        return self.parameters.default_max_seq_len

    def check(
        self, module: ScaledRotaryEmbedding, *, max_seq_len: int, static: bool, dtype: torch.dtype
    ) -> None:
        """Refuse positions that are not ids, and a static export of multimodal positions."""
        if self.parameters.coordinates:
            raise RotaryExportError(
                "the positions of this rope are coordinates in [-1, 1], a bundle accepts "
                "position_ids: rotary_export.rope has its tables"
            )
        if static and module.axes is not None:
            raise RotaryExportError(
                f"a static export has one position for each row, this rope has {module.num_axes} "
                "(mrope_section or axial)"
            )

    def collect_buffers(self, module: ScaledRotaryEmbedding, max_seq_len: int) -> dict[str, Tensor]:
        """Return the module's own frequencies, then those of lengths for which it stores none.

        Raises:
            RotaryExportError: It has other columns than its rope type.
        """
        (fresh,) = self.make_buffers(max_seq_len).values()
        own = module.inv_freq.detach().cpu()
        if own.shape[1:] != fresh.shape[1:]:
            raise RotaryExportError(
                f"inv_freq must have shape (n, {fresh.shape[1]}), got {tuple(own.shape)}"
            )
        return {"inv_freq": torch.cat((own, fresh[len(own) :]))[: len(fresh)]}

    def make_buffers(self, max_seq_len: int) -> dict[str, Tensor]:
        """Return those of a fresh module."""
        return ScaledTables(self.parameters, max_seq_len).state_dict()

    def make_tables(self, max_seq_len: int, buffers: Mapping[str, Tensor]) -> ScaledTables:
        """Build the module with static shapes."""
        tables = ScaledTables(self.parameters, max_seq_len)
        tables.load_state_dict(buffers)
        return tables

    def describe_tables(self, max_seq_len: int) -> tuple[TensorInfo, ...]:
        """Return cos_cache and sin_cache."""
        shape = (max_seq_len, self.rotary_dim // 2)
        return tuple(TensorInfo(name, "float32", shape) for name in ("cos_cache", "sin_cache"))

    def make_rotate(self, tables: ScaledTables, *, interleaved: bool, static: bool) -> nn.Module:
        """Build the module that stores the tables, or the frequencies of every length."""
        if not stores_tables(tables):
            module = ComputedStatic if static else ComputedQueryKey
            return module(tables, interleaved=interleaved)
        rotate = StoredQueryKey(tables, interleaved=interleaved)
        return StoredStatic(rotate, rotate.boundary) if static else rotate
