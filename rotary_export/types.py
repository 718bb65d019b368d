"""Types that every folder names."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]
Arrays = Mapping[str, Array]
Progress = Callable[[str], None]  # called with what is being done


def ignore_progress(step: str) -> None:
    """Report no progress."""
