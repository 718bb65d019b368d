"""Names of files. Standard library only."""

from __future__ import annotations

import os
from pathlib import Path

from rotary_export.errors import RotaryExportError


def check_path(path: str | os.PathLike[str]) -> None:
    """Refuse what no file can be called.

    Raises:
        RotaryExportError: It contains a NUL, or a character that is none.
    """
    try:
        is_valid = b"\0" not in os.fsencode(path)
    except UnicodeEncodeError:
        is_valid = False
    if not is_valid:
        raise RotaryExportError(f"a path must be text without NUL, got {os.fspath(path)!r}")


def identify(path: Path) -> tuple[int, int] | None:
    """Return numbers that change when a folder replaces another; None: there is no such path."""
    check_path(path)
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino


def cut_name(name: str, size: int) -> str:
    """Return the start of a file's name, at most `size` bytes of whole characters."""
    while len(os.fsencode(name)) > size:
        name = name[:-1]
    return name
