"""`rotate` of a static export: seq_len in place of position ids."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rotary_export.embedding import RotaryQueryKey
from rotary_export.op.torch_op import rotary_embedding


class RotateStatic(nn.Module):
    """Rotate the first `seq_len` of `max_seq_len` rows; the others come back unchanged.

    One row is added to the tables, the identity; rows at or past `seq_len` select it.
    """

    def __init__(self, rotate: RotaryQueryKey) -> None:
        super().__init__()
        self.max_seq_len = rotate.max_seq_len
        self.rotary_dim = rotate.rotary_dim
        self.interleaved = rotate.interleaved
        for name, identity in (("cos_cache", 1.0), ("sin_cache", 0.0), ("scale_cache", 1.0)):
            table = getattr(rotate, name)
            if table is not None:
                table = torch.cat((table, table.new_full((1, table.shape[1]), identity)))
            self.register_buffer(name, table, persistent=False)

    def forward(self, query: Tensor, key: Tensor, seq_len: Tensor) -> tuple[Tensor, Tensor]:
        """Rotate (B, N, max_seq_len, H) and (B, Nkv, max_seq_len, H); seq_len is (), int64."""
        row = torch.arange(self.max_seq_len, device=query.device)
        position_ids = torch.where(row < seq_len, row, self.max_seq_len)[None]  # (1, max_seq_len)
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
