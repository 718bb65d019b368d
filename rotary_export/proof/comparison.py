"""Compare arrays, element by element, in ulp."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rotary_export.types import Array


def to_comparable(tensor: Tensor) -> Array:
    """Return a tensor as numpy; bfloat16 as float32, which contains its values exactly."""
    return tensor.float().numpy() if tensor.dtype == torch.bfloat16 else tensor.numpy()


@dataclass(frozen=True)
class Error:
    """The largest difference of an output from what it is compared with.

    Attributes:
        max_abs: Largest absolute difference.
        max_ulp: Largest difference in the unit that the tolerance counts in.
        exact: Equal to the bit everywhere; a NaN equals a NaN.
        worst: Index of the largest difference.
    """

    max_abs: float = 0.0
    max_ulp: float = 0.0
    exact: bool = True
    worst: tuple[int, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return the error as values that JSON can express; it has no infinity."""
        values = asdict(self).items()
        return {k: str(v) if isinstance(v, float) and np.isinf(v) else v for k, v in values}

    def merge(self, other: Error) -> Error:
        """Return the worse of two."""
        worse = self if self.max_ulp >= other.max_ulp else other
        return Error(
            max(self.max_abs, other.max_abs), worse.max_ulp, self.exact and other.exact, worse.worst
        )


def compare(got: Array, want: Array, unit: Array) -> Error:
    """Compare element by element; NaN equals NaN.

    Args:
        got: Any shape.
        want: As got; exact means of the same dtype too.
        unit: What one ulp is, broadcastable to got, in the type to compute in.

    Returns:
        The largest difference; infinite where only one side is NaN or the shapes differ.
    """
    if got.shape != want.shape:
        return Error(float("inf"), float("inf"), exact=False)
    same_dtype = got.dtype == want.dtype
    got, want = got.astype(unit.dtype), want.astype(unit.dtype)
    both_nan = np.isnan(got) & np.isnan(want)
    same_bits = both_nan | ((got == want) & (np.signbit(got) == np.signbit(want)))
    if same_bits.all():
        return Error(exact=same_dtype)
    with np.errstate(invalid="ignore"):
        difference = np.abs(got - want)
    difference[both_nan | (got == want)] = 0
    difference[np.isnan(difference)] = np.inf
    ulp = difference / unit
    worst = np.unravel_index(int(ulp.argmax()), ulp.shape)
    index = tuple(int(i) for i in worst)
    return Error(float(difference.max()), float(ulp[worst]), exact=False, worst=index)
