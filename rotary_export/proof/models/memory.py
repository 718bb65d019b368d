"""Memory that the proof of a large model gives back before a session is opened."""

from __future__ import annotations

import ctypes
import gc


def release_memory() -> None:
    """Collect garbage, and return what glibc keeps of freed memory to the system."""
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError, TypeError):  # another C library
        pass
