"""Query and key, rotated by the fused op from what a `ScaledRotaryEmbedding` stores; stateless.

Two modules with the same `forward`: `StoredQueryKey` stores tables. `ComputedQueryKey` stores the
frequencies of every length, where there are as many tables as lengths (dynamic), and computes cos
and sin from them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rotary_export.embedding import PreciseBuffers
from rotary_export.op.torch_op import rotary_embedding
from rotary_export.rope.scaled_embedding import (
    ScaledRotaryEmbedding,
    build_cos_sin_cache,
    compute_length,
    select_inv_freq,
)


def stores_tables(rope: ScaledRotaryEmbedding) -> bool:
    """Return whether the tables of every length up to rope.max_seq_len are one or two."""
    return len(rope.inv_freq) == 1 or not rope.rope_parameters.varies_past_boundary


class _ScaledQueryKey(PreciseBuffers):
    """What both modules keep of a rope with a max_seq_len."""

    axes: Tensor | None

    def __init__(self, rope: ScaledRotaryEmbedding, interleaved: bool) -> None:
        super().__init__()
        assert rope.max_seq_len is not None
        self.max_seq_len = rope.max_seq_len
        self.rotary_dim = rope.dim
        self.interleaved = interleaved
        # Derived, so not in the state dict.
        self.register_buffer("axes", rope.axes, persistent=False)


class StoredQueryKey(_ScaledQueryKey):
    """Rotate query and key from stored tables.

    Where the tables don't depend on the length there is one, of max_seq_len rows. Longrope has two,
    one under the other; past the boundary, the ids are moved to the rows of the second.

    Args:
        rope: With a max_seq_len; `stores_tables` is true of it.
        interleaved: True: pairs (2i, 2i + 1); False: pairs (i, i + R/2).
    """

    cos_cache: Tensor
    sin_cache: Tensor

    def __init__(self, rope: ScaledRotaryEmbedding, *, interleaved: bool = False) -> None:
        super().__init__(rope, interleaved)
        self.num_axes = rope.num_axes
        # The rows of the first of two tables; 0: there is one.
        self.boundary = (rope.rope_parameters.length_boundary or 0) if len(rope.inv_freq) > 1 else 0
        # (max_seq_len, R/2), or (boundary + max_seq_len, R/2); float32.
        cos, sin = _build_stored_tables(rope, self.boundary)
        self.register_buffer("cos_cache", cos, persistent=False)
        self.register_buffer("sin_cache", sin, persistent=False)

    def forward(self, query: Tensor, key: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Rotate.

        Args:
            query: (B, N, S, H), float32, float16, bfloat16 or float64.
            key: (B, Nkv, S, H), as query.
            position_ids: (B, S), or (A, B, S) with several axes; int64, in [0, max_seq_len).

        Returns:
            query and key, rotated; same shapes and dtypes.

        Raises:
            RotaryExportError: Shapes or dtypes don't fit, or an id is outside [0, max_seq_len).
        """
        cos, sin, rows = self.cos_cache, self.sin_cache, self.find_rows(position_ids)
        if self.axes is None or rows.dim() == 2:
            ids: Tensor | None = rows
        else:
            cos, sin, ids = self._gather(cos, rows), self._gather(sin, rows), None
        return rotary_embedding(
            query, cos, sin, ids, key, interleaved=self.interleaved, rotary_dim=self.rotary_dim
        )

    def find_rows(self, position_ids: Tensor) -> Tensor:
        """Return the rows of the stored tables for positions.

        A negative id stays outside the tables, for the op to refuse; with several axes, where rows
        are gathered before it, as one past the last, since ONNX's Gather would wrap -1.
        """
        rows = position_ids
        if self.boundary:
            is_long = compute_length(position_ids) > self.boundary
            rows = position_ids + torch.where(is_long, self.boundary, 0)
        if self.axes is None:
            return torch.where(position_ids < 0, position_ids, rows) if self.boundary else rows
        return torch.where(position_ids < 0, self.boundary + self.max_seq_len, rows)

    def _gather(self, table: Tensor, rows: Tensor) -> Tensor:
        """Return (B, S, R/2) of (A, B, S) rows: each column from its axis."""
        assert self.axes is not None
        picked = torch.embedding(table, rows[0])
        for axis in range(1, self.num_axes):
            picked = torch.where(self.axes == axis, torch.embedding(table, rows[axis]), picked)
        return picked


def _build_stored_tables(rope: ScaledRotaryEmbedding, boundary: int) -> tuple[Tensor, Tensor]:
    """Build the table of short lengths, and with a boundary that of long ones below it."""
    assert rope.max_seq_len is not None
    positions = torch.arange(rope.max_seq_len, device=rope.inv_freq.device)[None]
    last = torch.tensor(rope.max_seq_len, device=positions.device)
    parts = [rope.build_tables(positions, last)]
    if boundary:
        parts.insert(0, rope.build_tables(positions[:, :boundary], last.new_tensor(boundary)))
    cos, sin = (torch.cat(tables, dim=1)[0] for tables in zip(*parts, strict=True))
    return cos, sin


class ComputedQueryKey(_ScaledQueryKey):
    """Rotate query and key from cos and sin that are computed, of the frequencies of every length.

    Args:
        rope: With a max_seq_len; `stores_tables` is false of it.
        interleaved: True: pairs (2i, 2i + 1); False: pairs (i, i + R/2).
    """

    inv_freq: Tensor

    def __init__(self, rope: ScaledRotaryEmbedding, *, interleaved: bool = False) -> None:
        super().__init__(rope, interleaved)
        self.rope_parameters = rope.rope_parameters
        self.register_buffer("inv_freq", rope.inv_freq, persistent=False)

    def forward(self, query: Tensor, key: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Rotate; as `StoredQueryKey.forward`."""
        cos, sin = self.compute_tables(position_ids, compute_length(position_ids))
        return self.rotate(query, cos, sin, key)

    def rotate(self, query: Tensor, cos: Tensor, sin: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        """Call the op with (B or 1, S, R/2) tables."""
        return rotary_embedding(
            query, cos, sin, None, key, interleaved=self.interleaved, rotary_dim=self.rotary_dim
        )

    def compute_tables(self, position_ids: Tensor, length: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the (B, S, R/2) tables of positions in a sequence of a given length."""
        inv_freq = select_inv_freq(self.rope_parameters, self.inv_freq, length, self.max_seq_len)
        return build_cos_sin_cache(self.rope_parameters, inv_freq, self.axes, position_ids, length)
