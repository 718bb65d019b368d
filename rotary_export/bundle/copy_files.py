"""Copies of files and folders, with the modes of new files: what the user's umask allows."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from fnmatch import fnmatch
from pathlib import Path


def copy_file(source: Path, target: Path) -> None:
    """Copy a file; an executable one stays executable."""
    mode = 0o666 | source.stat().st_mode & 0o111
    os.close(os.open(target, os.O_CREAT | os.O_WRONLY, mode))
    shutil.copyfile(source, target)


def copy_tree(
    source: Path,
    target: Path,
    left_out: Sequence[str] = (),
    copy: Callable[[Path, Path], None] = copy_file,
) -> None:
    """Copy a folder into a folder, which is made if it does not exist.

    Args:
        source: The folder.
        target: Where its files and folders go.
        left_out: Patterns of names that are not copied.
        copy: Copies one file.
    """
    target.mkdir(exist_ok=True)
    for each in source.iterdir():
        if any(fnmatch(each.name, pattern) for pattern in left_out):
            continue
        if each.is_dir():
            copy_tree(each, target / each.name, left_out, copy)
        else:
            copy(each, target / each.name)
