"""Modules of a few lines that apply a rotary embedding, or don't."""

from __future__ import annotations

import torch
from torch import nn

X = torch.randn(2, 6, 16)


def rope_of(x):
    angle = torch.arange(x.shape[1])[:, None] * 0.5 ** torch.arange(8)
    angle = torch.cat((angle, angle), -1)
    turned = torch.cat((-x[..., 8:], x[..., :8]), -1)
    return x * angle.cos() + turned * angle.sin()


class Plain(nn.Module):
    def forward(self, x):
        return x * 2


class Baked(nn.Module):
    """Looks at its length as a number."""

    def forward(self, x):
        if x.shape[1] % 7:
            return rope_of(x)
        return rope_of(x) * 2
