"""Frequencies that a converter rounded to a half type, restored from their closed form.

A frequency of 0.75 that is off by half an ulp of float16 turns position 2,000 by 0.24 rad too far.
What is stored does not contain the lost bits. The closed form does, if the frequencies have one:

    inv_freq[i] = base ** -(i / n),  i = 0 .. n - 1

A base is accepted if it has at most three significant digits and rounds to every stored value.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from rotary_export.types import Array

_MIN_SIZE = 4
_MAX_DIGITS = 3
_NORMAL = 2.0**-14  # below it, float16 has fewer bits


def restore_inv_freq(stored: Array) -> tuple[Array, float] | None:
    """Return frequencies before they were rounded.

    Args:
        stored: In a half type, of any shape with one axis that is not 1.

    Returns:
        In float32, and their base; None: they have no such closed form.
    """
    n = stored.size
    flat = stored.reshape(-1).astype(np.float64)
    if n < _MIN_SIZE or max(stored.shape) != n or flat[0] != 1 or (np.diff(flat) > 0).any():
        return None
    base = _find_base(flat, np.spacing(stored.reshape(-1)).astype(np.float64))
    if base is None:
        return None
    exact = base ** -(np.arange(n) / n)
    if not np.array_equal(exact.astype(stored.dtype), stored.reshape(-1)):
        return None
    return exact.astype(np.float32).reshape(stored.shape), base


def _find_base(flat: Any, ulps: Any) -> float | None:
    """Find the base of the fewest digits among those that round to all values."""
    at = np.flatnonzero(flat[1:] >= _NORMAL) + 1
    if not at.size:
        return None
    power = -flat.size / at
    low = ((flat[at] + ulps[at] / 2) ** power).max()
    high = ((flat[at] - ulps[at] / 2) ** power).min()
    if low > high:
        return None
    for digits in range(1, _MAX_DIGITS + 1):
        unit = 10.0 ** (math.floor(math.log10(high)) - digits + 1)
        base = math.floor(high / unit) * unit
        if base >= low:
            return float(base)
    return None
