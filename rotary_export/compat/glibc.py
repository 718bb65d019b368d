"""glibc: memory that was freed, and that it keeps."""

from __future__ import annotations

import ctypes


def return_memory() -> None:
    """Return freed memory to the system, where the C library is glibc."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
