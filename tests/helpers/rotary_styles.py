"""Ways in which models apply a rotary embedding, each a function of its own; and look-alikes."""

from __future__ import annotations

import torch
from torch import Tensor


def make_angles(seq_len: int, half: int, rows: int = 1) -> Tensor:
    """Angles (rows, S, R/2) of positions that differ from row to row."""
    position = torch.arange(seq_len) + 3 * torch.arange(rows)[:, None]
    return position[..., None] * 0.3 ** torch.arange(half)


def half_turn(x: Tensor) -> Tensor:
    a, b = x.chunk(2, dim=-1)
    return torch.cat((-b, a), dim=-1)


def pair_turn(x: Tensor) -> Tensor:
    return torch.stack((-x[..., 1::2], x[..., 0::2]), dim=-1).flatten(-2)


def rope_half(q, k, cos, sin):
    cos, sin = cos[:, None], sin[:, None]
    return q * cos + half_turn(q) * sin, k * cos + half_turn(k) * sin


def rope_pairs(q, k, cos, sin):
    cos, sin = (t.repeat_interleave(2, -1)[:, None] for t in (cos, sin))
    return q * cos + pair_turn(q) * sin, k * cos + pair_turn(k) * sin


def rope_leading(x, cos, sin):
    width = cos.shape[-1]
    head = x[..., :width]
    head = head * cos[:, None] + half_turn(head) * sin[:, None]
    return torch.cat((head, x[..., width:]), dim=-1)


def rope_trailing(x, cos, sin):
    width = cos.shape[-1]
    tail = x[..., -width:]
    tail = tail * cos[:, None] + pair_turn(tail) * sin[:, None]
    return torch.cat((x[..., :-width], tail), dim=-1)


def rope_middle(freqs, x):
    width = 2 * freqs.shape[-1]
    mid = x[..., 2 : 2 + width]
    angle = freqs.repeat_interleave(2, -1)[:, None]
    mid = mid * angle.cos() + pair_turn(mid) * angle.sin()
    return torch.cat((x[..., :2], mid, x[..., 2 + width :]), dim=-1)


def rope_complex(x, polar):
    pairs = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * polar[:, :, None, :]).flatten(-2).type_as(x)


def rope_deinterleave(q, k, cos, sin):
    def turn(x):
        a, b = x[..., 0::2], x[..., 1::2]
        c, s = cos[:, None], sin[:, None]
        return torch.cat((a * c - b * s, b * c + a * s), dim=-1)

    return turn(q), turn(k)


def rope_packed(packed, x):
    sin, cos = packed.chunk(2, dim=-1)
    return rope_pairs(x, x, cos, sin)[0]


def rope_scaled(x, angle, scale):
    """xPos, as x-transformers has it: the last rows, sizes from x."""
    rows = x.shape[-2]
    angle, scale = angle[:, -rows:], scale[-rows:]
    return (x * angle.cos()[:, None] + half_turn(x) * angle.sin()[:, None]) * scale


def rope_both_scaled(q, k, cos, sin, scale):
    """xPos of query and key: the key is divided by the scale."""
    rotated_q, rotated_k = rope_half(q, k, cos, sin)
    return rotated_q * scale, rotated_k / scale


def rope_three(q, k, v, cos, sin):
    return *rope_half(q, k, cos, sin), rope_half(v, v, cos, sin)[0]


def rope_maybe(q, k, cos, sin):
    rotated = rope_half(q, q, cos, sin)[0]
    return rotated, k


def rope_vision(q, k, cos, sin):
    cos, sin = cos[0][:, None], sin[0][:, None]  # (S, 1, H)
    return q * cos + half_turn(q) * sin, k * cos + half_turn(k) * sin


# What must not be replaced.
def rope_mixed(x, cos, sin):
    """Pairs, with tables tiled as for halves: the members of a pair turn by different angles."""
    return x * cos[:, None] + pair_turn(x) * sin[:, None]


def rope_uneven(x, cos, sin, cos2, sin2):
    """Halves; the second member of each pair has tables of its own."""
    a, b = x.chunk(2, dim=-1)
    c, s, c2, s2 = (table[:, None] for table in (cos, sin, cos2, sin2))
    return torch.cat((a * c - b * s, b * c2 + a * s2), dim=-1)


def rope_per_head(x, cos, sin):
    """Tables (B, N, S, H): each head has angles of its own."""
    return x * cos + half_turn(x) * sin


def rope_norm(x, cos, sin):
    return torch.nn.functional.normalize(rope_half(x, x, cos, sin)[0], dim=-1)


def rope_blocks(x, cos, sin):
    """Two axes: halves inside each half of the head."""
    parts = zip(x.chunk(2, -1), cos.chunk(2, -1), sin.chunk(2, -1), strict=True)
    return torch.cat([rope_half(a, a, c, s)[0] for a, c, s in parts], dim=-1)


def rope_masked(x, cos, sin):
    return rope_half(x, x, cos, sin)[0] * (torch.arange(x.shape[-1]) % 3 > 0)
