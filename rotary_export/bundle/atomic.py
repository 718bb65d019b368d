"""Write folders and files that appear whole or not at all, whenever the process ends.

They are made in a staging folder (`staging.py`). What a killed process leaves of it is deleted by
the next run, which says so. Nothing is written through a symbolic link.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from itertools import takewhile
from pathlib import Path

from rotary_export.bundle.paths import check_path
from rotary_export.bundle.staging import (
    NEW,
    OLD,
    ListFiles,
    clear_interrupted,
    exchange,
    move_files,
    open_staging,
)
from rotary_export.errors import RotaryExportError

CheckOwned = Callable[[Path], None]


def check_folder(path: Path, force: bool, check_owned: CheckOwned) -> None:
    """Refuse to replace a folder without force, or that is not of this package, or can't be made.

    Args:
        path: The folder to write.
        force: Replace what exists.
        check_owned: Raises where the folder at `path` contains something else than a bundle or kit.

    Raises:
        RotaryExportError: `path` exists and must stay, or can't be written.
    """
    _check_replaceable(path, force, check_owned)
    _check_writable(path)


def check_file(path: Path, force: bool) -> None:
    """Refuse to replace a file without force, or to write one in a folder that can't be written.

    Raises:
        RotaryExportError: `path` exists, is a folder or link, is not a valid name, or can't be
            written.
    """
    mode = _find_mode(path)
    if stat.S_ISDIR(mode):
        raise RotaryExportError(f"{path} is a folder")
    if mode and not stat.S_ISREG(mode):
        raise RotaryExportError(f"{path} is not a regular file; it can't be replaced")
    if mode and not force:
        raise RotaryExportError(f"{path} exists; force=True (--force) replaces it")
    _check_writable(path, path.parent)


def _find_mode(path: Path) -> int:
    """Return the mode of what exists at `path`, 0 if nothing does; refuse a symbolic link."""
    check_path(path)
    try:
        mode = path.lstat().st_mode
        target = os.readlink(path) if stat.S_ISLNK(mode) else ""
    except FileNotFoundError:
        return 0
    except OSError as error:  # such as a name that is too long
        raise _describe(error, path) from None
    if target:
        raise RotaryExportError(
            f"{path} is a symbolic link to {target}, which is not replaced: pass that path, or "
            "delete the link"
        )
    return mode


def _check_replaceable(path: Path, force: bool, check_owned: CheckOwned) -> None:
    check_path(path)
    clear_interrupted(path)
    if _is_free(path):
        return
    check_owned(path)
    if not force:
        raise RotaryExportError(f"{path} exists; force=True (--force) replaces it")


def _is_free(path: Path) -> bool:
    """Return whether nothing exists at `path`, or an empty folder, which is as good as nothing."""
    mode = _find_mode(path)
    try:
        return not mode or (stat.S_ISDIR(mode) and not any(path.iterdir()))
    except OSError as error:
        raise _describe(error, path) from None


def _check_writable(path: Path, parent: Path | None = None) -> None:
    """Check that files can be made in a folder; default: the nearest above `path` that exists."""
    try:
        if parent is None:
            parent = next(folder for folder in path.absolute().parents if folder.exists())
        if not stat.S_ISDIR(parent.stat().st_mode):
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        for name in path.absolute().relative_to(parent.absolute()).parts:
            with suppress(FileNotFoundError):
                (parent / name).lstat()  # raises for a name that is too long
        if not os.access(parent, os.W_OK | os.X_OK):
            read_only = os.statvfs(parent).f_flag & os.ST_RDONLY
            code = errno.EROFS if read_only else errno.EACCES
            raise OSError(code, os.strerror(code))
    except OSError as error:
        raise _describe(error, path) from None


@contextmanager
def write_folder(path: Path, force: bool, check_owned: CheckOwned) -> Iterator[Path]:
    """Yield a folder to write in, which replaces `path` once the block has ended.

    Args:
        path: Where it goes; the folder is made beside it, with the folders above it.
        force: Replace what exists; it is deleted only after it was replaced.
        check_owned: As of `check_folder`.

    Raises:
        RotaryExportError: `path` exists and must stay, or can't be written.
    """
    _check_replaceable(path, force, check_owned)
    try:
        with _make_folders(path.parent), open_staging(path) as staging:
            yield staging / NEW
            _move_into_place(staging, path, force, check_owned)
    except OSError as error:
        raise _describe(error, path) from error


@contextmanager
def _make_folders(folder: Path) -> Iterator[None]:
    """Make a folder and those above it; in the end, those that are empty are removed again."""
    missing = list(takewhile(lambda each: not each.exists(), (folder, *folder.parents)))
    try:
        for each in reversed(missing):
            each.mkdir(exist_ok=True)
        yield
    finally:
        for each in missing:
            with suppress(OSError):  # it does not exist, or is not empty
                each.rmdir()


@contextmanager
def write_files(
    path: Path,
    list_files: ListFiles = lambda path: set(),
    keep: Collection[Path] = (),
) -> Iterator[Path]:
    """Yield a folder to write files in, which move beside `path` once the block has ended.

    `path` itself, the file that names the others, moves last. Until then the file that it replaces
    must find those that it names: the others must have names of their own.

    Args:
        path: A file in a folder that exists.
        list_files: Returns the files, written with `path`, that `path` names at present. Those
            that nothing names after the move are deleted.
        keep: Files that are never deleted.

    Raises:
        RotaryExportError: `path` can't be written.
    """
    check_path(path)
    clear_interrupted(path, list_files)
    try:
        with open_staging(path) as staging:
            yield staging / NEW
            move_files(staging, path, list_files, set(keep))
    except OSError as error:
        raise _describe(error, path) from None


def _describe(error: OSError, path: Path) -> RotaryExportError:
    return RotaryExportError(f"{path} can't be written: {error.strerror or error}")


def _move_into_place(staging: Path, path: Path, force: bool, check_owned: CheckOwned) -> None:
    """Rename `new` to path; what exists is exchanged with it, and deleted only after that."""
    new, old = staging / NEW, staging / OLD
    if _is_free(path):
        new.rename(path)
        return
    _check_replaceable(path, force, check_owned)  # what exists now may not be what existed then
    if exchange(new, path):
        return
    try:
        path.rename(old)
        new.rename(path)
    except BaseException:  # Ctrl-C as well
        if old.exists() and not path.exists():
            old.rename(path)
        raise
