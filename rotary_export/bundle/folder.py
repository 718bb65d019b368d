"""The folder of a bundle: where it is to be written, and what it may replace."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager
from pathlib import Path

from rotary_export.bundle.atomic import check_folder, write_folder
from rotary_export.bundle.manifest import FILE_NAME, read_manifest
from rotary_export.bundle.paths import check_path
from rotary_export.errors import RotaryExportError


def find_out(out: str | os.PathLike[str]) -> Path:
    """Return where a bundle is to be written, or refuse what is not a path."""
    if not isinstance(out, (str, os.PathLike)):
        raise RotaryExportError(f"out must be a path, got {out!r}")
    check_path(out)
    return Path(out).absolute()


def _check_owned(path: Path, force: bool) -> None:
    """Refuse to replace a folder that is not a bundle; with force, also one that contains more."""
    try:
        manifest = read_manifest(path)
    except RotaryExportError as error:
        raise RotaryExportError(
            f"{path} exists and is not a bundle; it is left as it is ({error})"
        ) from None
    for file in path.iterdir() if force else ():
        if file.name not in (FILE_NAME, *manifest.files):
            raise RotaryExportError(
                f"{path} contains {file.name!r}, which is not of the bundle and would be lost"
            )


def check_out(path: Path, force: bool) -> None:
    """Check that a bundle can be written, before it is made.

    Raises:
        RotaryExportError: `path` already exists, or can't be written.
    """
    check_folder(path, force, lambda folder: _check_owned(folder, force))


def write_bundle(path: Path, force: bool) -> AbstractContextManager[Path]:
    """Return a context whose folder, a bundle to be, replaces `path` once the block has ended.

    Raises:
        RotaryExportError: `path` already exists, or can't be written.
    """
    return write_folder(path, force, lambda folder: _check_owned(folder, force))
