"""Modules that change while they run, each in another way."""

from __future__ import annotations

import copy

import torch
from helpers.tiny_modules import rope_of
from torch import nn


class Attributes(nn.Module):
    """Sets attributes in its forward, public and private."""

    def __init__(self):
        super().__init__()
        self.last = None
        self._calls = 0

    def forward(self, x):
        self.last, self._calls, self.seen = x, self._calls + 1, True
        return rope_of(x)


class Contents(nn.Module):
    """Fills a dict, a list and a set."""

    def __init__(self):
        super().__init__()
        self.kept, self.lengths, self.seen = {"first": 0}, [1, 2], {3}

    def forward(self, x):
        self.kept["last"] = x
        self.lengths.append(x)
        self.lengths[0] = x
        self.seen.add(4)
        return rope_of(x)


class Buffers(nn.Module):
    """Writes, resizes and registers buffers; has some that can't be copied."""

    def __init__(self):
        super().__init__()
        self.written = nn.Buffer(torch.zeros(3))
        self.resized = nn.Buffer(torch.ones(2))
        self.meta = nn.Buffer(torch.empty(3, device="meta"))
        self.sparse = nn.Buffer(torch.eye(3).to_sparse())

    def forward(self, x):
        if not torch.compiler.is_exporting():
            self.written.add_(1)
            self.resized.resize_(5)
        if "late" not in self._buffers:
            self.register_buffer("late", torch.ones(3))
        return rope_of(x)


class Submodules(nn.Module):
    """Makes, wraps and hooks submodules in its forward."""

    def __init__(self):
        super().__init__()
        self.made = None
        self.wrapped = nn.Identity()

    def forward(self, x):
        if self.made is None:
            self.made = nn.Identity()
        self.wrapped.register_forward_hook(lambda *_: None)
        self.wrapped = nn.Sequential(self.wrapped)
        return rope_of(self.made(x))


class Merged(nn.Module):
    """Merges its two weights for evaluation, as adapters do."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(16))
        self.added = nn.Parameter(torch.ones(16))
        self.merged = False

    def train(self, mode=True):
        super().train(mode)
        if mode == self.merged:
            self.weight.data += -self.added if mode else self.added
            self.merged = not mode
        return self

    def forward(self, x):
        return rope_of(x * (self.weight + (0 if self.merged else self.added)))


def describe_state(value):
    """Describe a module's state, tensors by type and value."""
    if isinstance(value, nn.Module):
        plain = {k: v for k, v in vars(value).items() if "hooks" not in k}
        return type(value), describe_state(plain), len(value._forward_hooks)
    if isinstance(value, dict):
        return {name: describe_state(item) for name, item in value.items()}
    if isinstance(value, torch.Tensor) and value.is_meta:
        return type(value), value.shape
    if isinstance(value, torch.Tensor):
        return type(value), value.to_dense().tolist()
    return copy.copy(value)


STATEFUL = (Attributes, Contents, Buffers, Submodules, Merged)
