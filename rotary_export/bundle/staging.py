"""Staging folders: where things are made before they replace others.

A staging folder lies beside its target NAME and is called `.NAME.TAG.RANDOM`. TAG is a hash of
NAME, by which a later run finds what a killed one left. The folder contains:

- `lock`: locked while its process runs, so that no other run takes it for a leftover;
- `new`: what is being made; after an exchange, what was replaced;
- `old`: the folder that is being replaced, where the system can't exchange two folders;
- `moves.json`: files that are being moved beside the target, and those to delete after that.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import json
import os
import re
import secrets
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from rotary_export.bundle.paths import cut_name
from rotary_export.errors import InterruptedWarning

with suppress(ImportError):  # Windows, where bundles can be read
    import fcntl

NEW, OLD, LOCK, MOVES = "new", "old", "lock", "moves.json"
ListFiles = Callable[[Path], set[Path]]

_NAME_BYTES = 100  # of the target's name in that of a staging folder; a name has at most 255
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP)
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # of Linux


def _make_prefix(name: str) -> str:
    tag = hashlib.sha256(os.fsencode(name)).hexdigest()[:8]
    return f".{cut_name(name, _NAME_BYTES)}.{tag}."


@contextmanager
def open_staging(path: Path) -> Iterator[Path]:
    """Yield a staging folder with an empty folder `new`; it is deleted in the end.

    Args:
        path: The target, in a folder that exists.

    Raises:
        OSError: It can't be made.
    """
    staging, lock = _make_staging(path)
    try:
        (staging / NEW).mkdir()
        yield staging
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def _make_staging(path: Path) -> tuple[Path, int | None]:
    """Make a staging folder; return it with its lock, None where files can't be locked."""
    while True:
        staging = path.with_name(_make_prefix(path.name) + secrets.token_hex(4))
        staging.mkdir()
        try:
            lock = _lock(staging)
        except OSError as error:
            if error.errno in _NO_LOCKS:
                return staging, None
            shutil.rmtree(staging, ignore_errors=True)
            raise
        if lock is not None:  # else a run that found it unlocked is deleting it
            return staging, lock


def _lock(staging: Path) -> int | None:
    """Lock a staging folder; return the lock, or None if it belongs to a process that runs.

    Raises:
        OSError: Files can't be locked here, or not by this user.
    """
    file = staging / LOCK
    try:
        lock = os.open(file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
    except FileNotFoundError:  # it was deleted meanwhile
        return None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(lock), file.stat()):
            return lock
    except (BlockingIOError, FileNotFoundError):
        pass
    except OSError:
        os.close(lock)
        raise
    os.close(lock)
    return None


def list_staging(path: Path) -> list[Path]:
    """List the staging folders of a target, by this user, of runs that go on or were killed."""
    pattern = re.compile(re.escape(_make_prefix(path.name)) + "[0-9a-f]{8}")
    found = []
    with suppress(OSError), os.scandir(path.parent) as entries:  # there may be no such folder
        for entry in entries:
            if pattern.fullmatch(entry.name) and entry.is_dir(follow_symlinks=False):
                if entry.stat(follow_symlinks=False).st_uid == os.geteuid():
                    found.append(Path(entry.path))
    return sorted(found)


def clear_interrupted(path: Path, list_files: ListFiles | None = None) -> None:
    """Delete what killed runs left beside a target, after what they had replaced is restored.

    A warning names each folder. The folder of a process that still runs is not touched.

    Args:
        path: The target.
        list_files: As of `finish_moves`; None: folders that contain moves are not touched.
    """
    for staging in list_staging(path):
        try:
            lock = _lock(staging)
        except OSError as error:
            _warn(f"{staging} may be of an interrupted run, but can't be locked: {error.strerror}")
            continue
        if lock is None:
            continue
        try:
            if list_files is None and (staging / MOVES).exists():
                continue
            restored = _restore(staging, path)
            if list_files is not None:
                finish_moves(staging, path, list_files)
            shutil.rmtree(staging, ignore_errors=True)
        except OSError as error:
            _warn(f"{staging} of an interrupted run can't be cleared: {error.strerror}")
        else:
            done = f"restored {path} from it and " if restored else ""
            _warn(f"an earlier run was interrupted and left {staging}: {done}deleted it")
        finally:
            os.close(lock)


def _warn(message: str) -> None:
    warnings.warn(message, InterruptedWarning, stacklevel=2)


def _is_kept(staging: Path) -> bool:
    """Return whether `old` was moved away, and `new` not to its place."""
    return (staging / OLD).exists() and (staging / NEW).exists()


def _restore(staging: Path, path: Path) -> bool:
    """Move back a folder that was replaced by nothing.

    Raises:
        OSError: Something else was made at `path` since.
    """
    if not _is_kept(staging):
        return False
    (staging / OLD).rename(path)
    return True


def describe_kept(path: Path) -> str:
    """Return where an interrupted run kept what was at `path`; empty if there is no such run."""
    kept = [] if os.path.lexists(path) else list(filter(_is_kept, list_staging(path)))
    if not kept:
        return ""
    return f"; an interrupted run left it in {kept[0] / OLD}, and the next run restores it"


def exchange(first: Path, second: Path) -> bool:
    """Exchange two paths at once; return False where the system can't.

    Raises:
        OSError: Another error.
    """
    sys.audit("rotary_export.exchange", str(first), str(second))
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        return False
    paths = os.fsencode(first), os.fsencode(second)
    if renameat2(_AT_FDCWD, paths[0], _AT_FDCWD, paths[1], _RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP):
        return False
    raise OSError(code, os.strerror(code), str(second))


def move_files(staging: Path, path: Path, list_files: ListFiles, keep: set[Path]) -> None:
    """Move the files in `new` beside `path`, itself last, and delete those it no longer needs.

    Args:
        staging: Of `path`.
        path: The file that names the others.
        list_files: Returns the files, written with `path`, that `path` names at present.
        keep: Files that are never deleted.
    """
    with _lock_folder(path.parent):
        files = sorted((staging / NEW).iterdir(), key=lambda file: file.name == path.name)
        made = [f.name for f in files if f.name != path.name and not _beside(path, f.name).exists()]
        old = [file.name for file in list_files(path) - keep]
        (staging / MOVES).write_text(json.dumps({NEW: made, OLD: old}), encoding="utf-8")
        try:
            for file in files:
                os.replace(file, _beside(path, file.name))
        finally:
            finish_moves(staging, path, list_files)


def finish_moves(staging: Path, path: Path, list_files: ListFiles) -> None:
    """Delete the files of the graph that was replaced; if none was, those that were to be new.

    What `path` names at present stays.
    """
    try:
        moves = json.loads((staging / MOVES).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):  # nothing was moved yet
        return
    is_replaced = not (staging / NEW / path.name).exists()
    files = {_beside(path, name) for name in moves[OLD if is_replaced else NEW]}
    for file in files - list_files(path):
        file.unlink(missing_ok=True)


def _beside(path: Path, name: str) -> Path:
    return path.with_name(name)  # which refuses a name with a separator


@contextmanager
def _lock_folder(folder: Path) -> Iterator[None]:
    """Let one process at a time move files into a folder, where folders can be locked."""
    lock = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)
