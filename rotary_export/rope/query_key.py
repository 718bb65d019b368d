"""`ScaledQueryKey`: the fused op on the tables of a `ScaledRotaryEmbedding`, for a plain bundle."""

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


class ScaledQueryKey(PreciseBuffers):
    """Rotate query and key with the one fused op, stateless, from what is stored.

    Where the tables don't depend on the length there is one, of max_seq_len rows. Longrope has two,
    one under the other, and adds the rows of the first to the ids where the length is past its
    switch. Dynamic stores the frequencies of every length and computes cos and sin from them.

    Args:
        rope: With a max_seq_len.
        interleaved: True: pairs (2i, 2i + 1); False: pairs (i, i + R/2).
    """

    inv_freq: Tensor | None
    axes: Tensor | None
    cos_cache: Tensor | None
    sin_cache: Tensor | None

    def __init__(self, rope: ScaledRotaryEmbedding, *, interleaved: bool = False) -> None:
        super().__init__()
        assert rope.max_seq_len is not None
        self.max_seq_len = rope.max_seq_len
        self.rotary_dim = rope.dim
        self.interleaved = interleaved
        self.rope_parameters = rope.rope_parameters
        self.num_axes = rope.num_axes
        depends = len(rope.inv_freq) > 1
        computes = depends and rope.rope_parameters.rope_type == "dynamic"
        # Rows of the first of two tables; 0: there is one.
        self.switch = (rope.rope_parameters.switch_length or 0) if depends and not computes else 0
        # (max_seq_len, R/2), or (switch + max_seq_len, R/2); float32.
        cos, sin = (None, None) if computes else _build_stored_tables(rope, self.switch)
        # Derived, so not in the state dict.
        self.register_buffer("inv_freq", rope.inv_freq if computes else None, persistent=False)
        self.register_buffer("axes", rope.axes, persistent=False)
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
        length = compute_length(position_ids)
        if self.inv_freq is not None:
            cos, sin = self.compute_tables(self.inv_freq, position_ids, length)
            return self.rotate(query, cos, sin, None, key)
        rows = self.find_rows(position_ids, length)
        assert self.cos_cache is not None
        assert self.sin_cache is not None
        if self.axes is None or rows.dim() == 2:
            return self.rotate(query, self.cos_cache, self.sin_cache, rows, key)
        cos, sin = (self._gather(table, rows) for table in (self.cos_cache, self.sin_cache))
        return self.rotate(query, cos, sin, None, key)

    def rotate(
        self, query: Tensor, cos: Tensor, sin: Tensor, rows: Tensor | None, key: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Call the op."""
        return rotary_embedding(
            query,
            cos,
            sin,
            rows,
            key,
            interleaved=self.interleaved,
            rotary_dim=self.rotary_dim,
        )

    def compute_tables(
        self, inv_freq: Tensor, position_ids: Tensor, length: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Compute (B, S, R/2) tables, where they can't be stored."""
        chosen = select_inv_freq(self.rope_parameters, inv_freq, length, self.max_seq_len)
        return build_cos_sin_cache(self.rope_parameters, chosen, self.axes, position_ids, length)

    def find_rows(self, positions: Tensor, length: Tensor) -> Tensor:
        """Return the rows of the stored tables for positions in a sequence of a given length.

        A negative id stays outside the tables, for the op to refuse; with several axes, where rows
        are gathered before it, as one past the last, since ONNX's Gather would wrap -1.
        """
        rows = positions
        if self.switch:
            rows = positions + torch.where(length > self.switch, self.switch, 0)
        if self.axes is None:
            return torch.where(positions < 0, positions, rows) if self.switch else rows
        return torch.where(positions < 0, self.switch + self.max_seq_len, rows)

    def _gather(self, table: Tensor, rows: Tensor) -> Tensor:
        """Return (B, S, R/2) of (A, B, S) rows: each column from its axis."""
        assert self.axes is not None
        picked = torch.embedding(table, rows[0])
        for axis in range(1, self.num_axes):
            picked = torch.where(self.axes == axis, torch.embedding(table, rows[axis]), picked)
        return picked


def _build_stored_tables(rope: ScaledRotaryEmbedding, switch: int) -> tuple[Tensor, Tensor]:
    """Build the table of short lengths, and below it that of long ones if there is a switch."""
    assert rope.max_seq_len is not None
    positions = torch.arange(rope.max_seq_len, device=rope.inv_freq.device)[None]
    last = torch.tensor(rope.max_seq_len, device=positions.device)
    parts = [rope.build_tables(positions, last)]
    if switch:
        parts.insert(0, rope.build_tables(positions[:, :switch], last.new_tensor(switch)))
    cos, sin = (torch.cat(tables, dim=1)[0] for tables in zip(*parts, strict=True))
    return cos, sin


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


class ScaledStatic(ScaledQueryKey):
    """Rotate the first `seq_len` of `max_seq_len` rows; the others come back unchanged."""

    def __init__(self, rope: ScaledRotaryEmbedding, *, interleaved: bool = False) -> None:
        super().__init__(rope, interleaved=interleaved)
        for name, identity in (("cos_cache", 1.0), ("sin_cache", 0.0)):
            table = getattr(self, name)
            if table is not None:  # one more row, which rows at or past seq_len select
                row = table.new_full((1, table.shape[1]), identity)
                setattr(self, name, torch.cat((table, row)))

    def forward(self, query: Tensor, key: Tensor, seq_len: Tensor) -> tuple[Tensor, Tensor]:
        """Rotate (B, N, max_seq_len, H) and (B, Nkv, max_seq_len, H); seq_len is (), int64."""
        length = seq_len.clamp(0, self.max_seq_len)
        positions = torch.arange(self.max_seq_len, device=query.device)
        keep = positions < length
        if self.inv_freq is not None:
            cos, sin = self.compute_tables(self.inv_freq, positions[None], length)
            cos = torch.where(keep[:, None], cos, 1.0)
            sin = torch.where(keep[:, None], sin, 0.0)
            return self.rotate(query, cos, sin, None, key)
        assert self.cos_cache is not None
        assert self.sin_cache is not None
        identity = self.switch + self.max_seq_len
        rows = torch.where(keep, self.find_rows(positions, length), identity)
        return self.rotate(query, self.cos_cache, self.sin_cache, rows[None], key)
