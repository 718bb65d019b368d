"""`rotate` of a static export: seq_len in place of position ids."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rotary_export.embedding import RotaryQueryKey
from rotary_export.op.torch_op import rotary_embedding
from rotary_export.rope.scaled_query_key import ComputedQueryKey, StoredQueryKey

IDENTITY = {"cos_cache": 1.0, "sin_cache": 0.0, "scale_cache": 1.0}


class StoredStatic(nn.Module):
    """Rotate the first `seq_len` of `max_seq_len` rows; the others are returned unchanged.

    One row is added to the stored tables, the identity; rows at or past `seq_len` select it.

    Args:
        rotate: The module of the dynamic graph.
        boundary: Rows of the first of two tables, for lengths up to it; 0: there is one.
    """

    def __init__(self, rotate: RotaryQueryKey | StoredQueryKey, boundary: int = 0) -> None:
        super().__init__()
        self.max_seq_len = rotate.max_seq_len
        self.rotary_dim = rotate.rotary_dim
        self.interleaved = rotate.interleaved
        self.boundary = boundary
        tables = dict(rotate.named_buffers())
        for name, identity in IDENTITY.items():
            table = tables.get(name)
            if table is not None:
                table = torch.cat((table, table.new_full((1, table.shape[1]), identity)))
            self.register_buffer(name, table, persistent=False)

    def forward(self, query: Tensor, key: Tensor, seq_len: Tensor) -> tuple[Tensor, Tensor]:
        """Rotate (B, N, max_seq_len, H) and (B, Nkv, max_seq_len, H); seq_len is (), int64."""
        position = torch.arange(self.max_seq_len, device=query.device)
        row = position
        if self.boundary:
            row = position + torch.where(seq_len > self.boundary, self.boundary, 0)
        identity = self.boundary + self.max_seq_len
        position_ids = torch.where(position < seq_len, row, identity)[None]  # (1, max_seq_len)
        return rotary_embedding(
            query,
            self.get_buffer("cos_cache"),
            self.get_buffer("sin_cache"),
            position_ids,
            key,
            self.scale_cache,  # type: ignore[arg-type]
            interleaved=self.interleaved,
            rotary_dim=self.rotary_dim,
        )


class ComputedStatic(ComputedQueryKey):
    """As `StoredStatic`, of computed tables: rows at or past `seq_len` become the identity."""

    def forward(self, query: Tensor, key: Tensor, seq_len: Tensor) -> tuple[Tensor, Tensor]:
        """Rotate (B, N, max_seq_len, H) and (B, Nkv, max_seq_len, H); seq_len is (), int64."""
        length = seq_len.clamp(0, self.max_seq_len)
        position = torch.arange(self.max_seq_len, device=query.device)
        keep = (position < length)[:, None]  # (max_seq_len, 1)
        cos, sin = self.compute_tables(position[None], length)
        cos = torch.where(keep, cos, IDENTITY["cos_cache"])
        sin = torch.where(keep, sin, IDENTITY["sin_cache"])
        return self.rotate(query, cos, sin, key)
