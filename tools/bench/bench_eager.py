"""Torch's eager op beside plain torch, for tools/bench/bench.py."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from rotary_export import rotary_embedding
from rotary_export.measure.timing import Call

# Of glibc's malloc.h, with the values that glibc starts with.
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
MMAP_MAX, TRIM_THRESHOLD = 65536, 128 * 1024


@contextmanager
def allocator_that_keeps_memory(wanted: bool) -> Iterator[None]:
    """Have malloc keep what is freed, as jemalloc and tcmalloc do; glibc hands back 32 MiB blocks.

    What comes fresh from the system is zeroed page by page, which takes longer than to rotate.
    """
    libc = ctypes.CDLL(None)
    if wanted:
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
    try:
        yield
    finally:
        if wanted:
            libc.mallopt(M_MMAP_MAX, MMAP_MAX)
            libc.mallopt(M_TRIM_THRESHOLD, TRIM_THRESHOLD)
            libc.malloc_trim(0)


def rotate_half(x: Tensor) -> Tensor:
    """Return (-second half, first half)."""
    first, second = x.chunk(2, -1)
    return torch.cat((-second, first), -1)


def make_eager_calls() -> dict[str, Call]:
    """Return the op and plain torch on (1, 32, 2048, 128) float32, checked to be equal."""
    x = torch.randn(1, 32, 2048, 128)
    angles = torch.arange(2048)[:, None] * 10000.0 ** (-torch.arange(64) / 64)
    half_cos, half_sin = angles.cos(), angles.sin()
    cos, sin = (torch.cat((t, t), -1) for t in (half_cos, half_sin))
    ids = torch.arange(2048)[None]

    def run_op() -> Tensor:
        return rotary_embedding(x, half_cos, half_sin, ids)[0]

    def run_plain() -> Tensor:
        return x * cos + rotate_half(x) * sin

    if not torch.equal(run_op(), run_plain()):
        raise AssertionError("the op is not equal to plain torch")
    return {"op": run_op, "plain torch": run_plain, "copy": x.clone}
