"""A folder is written beside its place, and appears there whole or not at all."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rotary_export.errors import RotaryExportError


@contextmanager
def make_staging(path: Path, check_out: Callable[[], None]) -> Iterator[Path]:
    """Give a folder to write in, gone at the end unless it was moved to `path`.

    Args:
        path: Where it is to be; the folder is made beside it, or in the nearest parent there is.
        check_out: Refuses what is at `path` and must stay.

    Raises:
        RotaryExportError: What `check_out` says, or `path` can't be written.
    """
    try:
        check_out()
        parent = next(folder for folder in path.parents if folder.exists())
        staging = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=parent))
    except OSError as error:
        raise _describe(error, path) from None
    try:
        yield staging
    except OSError as error:
        raise _describe(error, path) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _describe(error: OSError, path: Path) -> RotaryExportError:
    return RotaryExportError(f"{path} can't be written: {error.strerror or error}")


def move_into_place(staging: Path, path: Path, force: bool) -> None:
    """Rename staging to path; with force, what was there goes only once it is replaced."""
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
