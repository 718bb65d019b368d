"""Types that every folder names, and the names of dtypes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]
Arrays = Mapping[str, Array]
Progress = Callable[[str], None]  # called with what is being done


def ignore_progress(step: str) -> None:
    """Report no progress."""


def name_dtype(dtype: Any) -> str:
    """Return the name of a torch or numpy dtype as manifests contain it, such as "bfloat16"."""
    return str(dtype).removeprefix("torch.")
