"""Write folders and files that appear whole or not at all, whenever the process ends.

A process that is killed may leave its staging folder, `.NAME.xxxxxxxx`, beside the target.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rotary_export.errors import RotaryExportError


def check_folder(path: Path, force: bool, check_owned: Callable[[Path], None]) -> None:
    """Refuse to replace a folder without force, or that is not of this package, or can't be made.

    Args:
        path: The folder to write.
        force: Replace what exists.
        check_owned: Raises where the folder at `path` contains something else than a bundle or kit.

    Raises:
        RotaryExportError: `path` exists and must stay, or can't be written.
    """
    _check_replaceable(path, force, check_owned)
    try:
        _make_staging(path, _find_parent(path)).rmdir()
    except OSError as error:
        raise _describe(error, path) from None


def _check_replaceable(path: Path, force: bool, check_owned: Callable[[Path], None]) -> None:
    try:
        if not path.exists() or (path.is_dir() and not any(path.iterdir())):
            return
    except OSError as error:
        raise _describe(error, path) from None
    check_owned(path)
    if not force:
        raise RotaryExportError(f"{path} exists; force=True (--force) replaces it")


def _find_parent(path: Path) -> Path:
    """Return the nearest folder above `path` that exists."""
    return next(folder for folder in path.absolute().parents if folder.exists())


def _make_staging(path: Path, parent: Path) -> Path:
    """Make an empty folder for what is to become `path`."""
    return Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=parent))


def check_file(path: Path, force: bool) -> None:
    """Refuse to replace a file without force, or to write one in a folder that can't be written.

    Raises:
        RotaryExportError: `path` exists, is a folder, is not a valid name, or can't be written.
    """
    try:
        exists = path.exists()
    except OSError as error:  # a name that is too long
        raise _describe(error, path) from None
    if path.is_dir():
        raise RotaryExportError(f"{path} is a folder")
    if exists and not force:
        raise RotaryExportError(f"{path} exists; force=True (--force) replaces it")
    try:
        _make_staging(path, path.parent).rmdir()
    except OSError as error:
        raise _describe(error, path) from None


@contextmanager
def write_folder(path: Path, force: bool, check_owned: Callable[[Path], None]) -> Iterator[Path]:
    """Yield a folder to write in, which replaces `path` once the block has ended.

    Args:
        path: Where it goes; the folder is made beside it, or in the nearest parent that exists.
        force: Replace what exists; it is deleted only after it was replaced.
        check_owned: As of `check_folder`.

    Raises:
        RotaryExportError: `path` exists and must stay, or can't be written.
    """
    _check_replaceable(path, force, check_owned)
    try:
        staging = _make_staging(path, _find_parent(path))
    except OSError as error:
        raise _describe(error, path) from None
    try:
        yield staging
        _move_into_place(staging, path, force)
    except OSError as error:
        raise _describe(error, path) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


@contextmanager
def write_files(path: Path) -> Iterator[Path]:
    """Yield a folder to write files in, which move beside `path` once the block has ended.

    `path` itself, the file that names the others, moves last.

    Args:
        path: A file in a folder that exists.

    Raises:
        RotaryExportError: `path` can't be written.
    """
    try:
        staging = _make_staging(path, path.parent)
    except OSError as error:
        raise _describe(error, path) from None
    try:
        yield staging
        for file in sorted(staging.iterdir(), key=lambda file: file.name == path.name):
            os.replace(file, path.with_name(file.name))
    except OSError as error:
        raise _describe(error, path) from None
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _describe(error: OSError, path: Path) -> RotaryExportError:
    return RotaryExportError(f"{path} can't be written: {error.strerror or error}")


def _move_into_place(staging: Path, path: Path, force: bool) -> None:
    """Rename staging to path; with force, what exists is deleted only after it was replaced."""
    staging.chmod(0o755)  # mkdtemp's folder is for its owner alone
    path.parent.mkdir(parents=True, exist_ok=True)
    if not force or not path.exists():
        staging.rename(path)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{path.name}.old.", dir=path.parent))
    try:
        path.rename(old / path.name)
        staging.rename(path)
    except BaseException:  # Ctrl-C as well
        if not path.exists():
            (old / path.name).rename(path)
        raise
    finally:
        shutil.rmtree(old, ignore_errors=True)
