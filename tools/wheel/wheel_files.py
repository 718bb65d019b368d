"""What is in an sdist and in a wheel, and on which Linux the wheel runs."""

from __future__ import annotations

import platform
import re
import subprocess
import tarfile
import zipfile
from collections.abc import Iterable, Sequence
from pathlib import Path

LIBRARY = "rotary_export/librotary_export.so"
GLIBC = (2, 17)  # manylinux2014, the oldest images in use, and the first glibc for aarch64
PLATFORM = f"manylinux_{GLIBC[0]}_{GLIBC[1]}_{platform.machine()}"
METADATA = frozenset("METADATA RECORD WHEEL entry_points.txt licenses/LICENSE".split())
NOT_IN_SDIST = (".ci/",)


def tag_wheel(wheel: Path, out: Path, auditwheel: Sequence[str]) -> Path:
    """Let auditwheel check a wheel, and write it with the tag of `GLIBC`.

    Args:
        wheel: As the build backend wrote it.
        out: The folder for the tagged one.
        auditwheel: How the program is started.

    Returns:
        The tagged wheel.

    Raises:
        RuntimeError: auditwheel refuses, since the library needs a newer glibc or another library.
    """
    command = [*auditwheel, "repair", "--plat", PLATFORM, "--wheel-dir", str(out), str(wheel)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{wheel.name} can't be {PLATFORM}: {done.stderr.strip()}")
    (tagged,) = out.glob("*.whl")
    return tagged


def check_wheel(wheel: Path, tracked: Iterable[str]) -> list[str]:
    """Return what is wrong with the names of a tagged wheel and of its files.

    Args:
        wheel: The file.
        tracked: The paths that git tracks.
    """
    name, version, python, abi, platforms = wheel.stem.split("-")
    problems = []
    if (python, abi) != ("py3", "none") or PLATFORM not in platforms.split("."):
        problems.append(f"{wheel.name} is not py3-none-{PLATFORM}")
    info = f"{name}-{version}.dist-info"
    want = {path for path in tracked if path.startswith("rotary_export/")} | {LIBRARY}
    with zipfile.ZipFile(wheel) as file:
        names = {entry for entry in file.namelist() if not entry.endswith("/")}
    want |= {f"{info}/{path}" for path in METADATA}
    return problems + compare_names(wheel.name, names, want)


def check_sdist(sdist: Path, tracked: Iterable[str]) -> list[str]:
    """Return what is wrong with the names of an sdist's files; `tracked` as in `check_wheel`."""
    with tarfile.open(sdist) as file:
        names = {member.name.partition("/")[2] for member in file if not member.isdir()}
    want = {path for path in tracked if not path.startswith(NOT_IN_SDIST)} | {"PKG-INFO"}
    return compare_names(sdist.name, names, want)


def compare_names(what: str, got: set[str], want: set[str]) -> list[str]:
    """Return a sentence for each name that is missing or too much."""
    missing = [f"{what} lacks {name}" for name in sorted(want - got)]
    return missing + [f"{what} must not contain {name}" for name in sorted(got - want)]


def find_needed(library: Path) -> list[str]:
    """Return the libraries that a library links to, by readelf."""
    return re.findall(r"NEEDED.*\[(.*)\]", _read_elf("-dW", library))


def find_highest_glibc(library: Path) -> tuple[int, ...]:
    """Return the highest version of glibc's symbols that a library uses, by readelf."""
    versions = re.findall(r"GLIBC_([0-9.]+)", _read_elf("-VW", library))
    return max(tuple(int(part) for part in version.split(".")) for version in versions)


def _read_elf(option: str, library: Path) -> str:
    command = ["readelf", option, str(library)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout
