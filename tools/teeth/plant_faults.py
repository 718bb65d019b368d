#!/usr/bin/env python3
"""Plant faults, one at a time, and see whether the tests of their own folder catch them.

    python tools/teeth/plant_faults.py [--only TEXT] [--every N] [--list] [--json FILE]

Each fault of faults/*.toml is planted in a copy of the checkout; its tests run there, until the
first failure, for at most three minutes. A fault in C++ is compiled first, which needs cmake and a
C++ compiler. A fault that its tests do not notice survives: exit code 1. Before, each selection of
tests runs once without a fault, and must pass. Needs an environment with '.[test]'.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
LIBRARY = "librotary_export.so"
LIMIT = 180  # seconds of tests for each fault


@dataclass(frozen=True)
class Fault:
    """One fault.

    Attributes:
        name: What is wrong when it is planted.
        file: Where, from the top of the checkout.
        old: A text that the file contains once.
        new: What replaces it.
        tests: Files and folders of tests that must notice.
    """

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]


def read_faults() -> list[Fault]:
    """Read the faults of every folder, those in C++ first."""
    faults = []
    for path in sorted((Path(__file__).parent / "faults").glob("*.toml")):
        rows = tomllib.loads(path.read_text(encoding="utf-8"))["fault"]
        faults += [Fault(**row | {"tests": tuple(row["tests"])}) for row in rows]
    return faults


@dataclass(frozen=True)
class Outcome:
    """What became of a fault.

    Attributes:
        name: Of the fault.
        file: Where it was planted.
        caught: Whether a test failed, or the tests did not end in time.
        by: The first test that failed.
        seconds: How long the tests took.
    """

    name: str
    file: str
    caught: bool
    by: str
    seconds: float


class Copy:
    """A copy of the checkout in which faults are planted."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        tracked = subprocess.run(
            ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
        )
        for name in tracked.stdout.splitlines():
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target)
        for name in ("ort_headers", "bare", "targets"):  # what tests look for in build/
            if (ROOT / "build" / name).exists():
                (folder / "build").mkdir(exist_ok=True)
                (folder / "build" / name).symlink_to(ROOT / "build" / name)

    def build(self) -> None:
        """Compile the op library, and put it beside the package's files."""
        build = self.folder / "build" / "library"
        source = self.folder / "rotary_export" / "csrc"
        for command in (
            [
                "cmake",
                "-S",
                str(source),
                "-B",
                str(build),
                "-DCMAKE_BUILD_TYPE=Debug",
                "-DCMAKE_CXX_FLAGS=-w",
            ],
            ["cmake", "--build", str(build), "--parallel", "2"],
        ):
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        shutil.copy2(build / LIBRARY, self.folder / "rotary_export" / LIBRARY)

    def run(self, tests: tuple[str, ...]) -> tuple[bool, str, float]:
        """Run tests until one fails; return whether all passed, the first failure, the seconds."""
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-n", "2", "--no-header", *tests]
        environment = os.environ | {"PYTHONPATH": str(self.folder)}
        start = time.monotonic()
        try:
            done = subprocess.run(
                command,
                cwd=self.folder,
                env=environment,
                capture_output=True,
                text=True,
                check=False,
                timeout=LIMIT,
            )
        except subprocess.TimeoutExpired:
            return False, f"no end in {LIMIT} seconds", time.monotonic() - start
        lines = done.stdout.splitlines()
        failed = [line for line in lines if line.startswith(("FAILED ", "ERROR "))]
        first = failed[0].split(" ", 1)[1].split(" - ")[0] if failed else ""
        if done.returncode and not failed:
            first = (lines or done.stderr.splitlines() or [""])[-1]
        return done.returncode == 0, first, time.monotonic() - start


@contextmanager
def plant(copy: Copy, fault: Fault) -> Iterator[None]:
    """Write a fault into the copy for as long as the context lasts."""
    path = copy.folder / fault.file
    text = path.read_text(encoding="utf-8")
    if text.count(fault.old) != 1:
        sys.exit(f"{fault.name}: {fault.file} contains {text.count(fault.old)} times {fault.old!r}")
    is_native = fault.file.startswith("rotary_export/csrc/")
    try:
        path.write_text(text.replace(fault.old, fault.new), encoding="utf-8")
        if is_native:
            copy.build()
        yield
    finally:
        path.write_text(text, encoding="utf-8")
        if is_native:
            copy.build()


def try_fault(copy: Copy, fault: Fault) -> Outcome:
    """Plant a fault and run its tests."""
    with plant(copy, fault):
        passed, first, seconds = copy.run(fault.tests)
    return Outcome(fault.name, fault.file, not passed, first, round(seconds, 1))


def main() -> None:
    """Plant and report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="faults whose name contains this text")
    parser.add_argument("--every", type=int, default=1, help="each N-th of them, as a sample")
    parser.add_argument("--list", action="store_true", help="list the faults and stop")
    parser.add_argument("--json", type=Path, help="write the outcomes to this file")
    arguments = parser.parse_args()
    faults = [fault for fault in read_faults() if arguments.only in fault.name][:: arguments.every]
    if arguments.list:
        for fault in faults:
            print(f"{fault.name:45} {fault.file}")
        return
    outcomes = []
    with tempfile.TemporaryDirectory(prefix="faults.") as folder:
        copy = Copy(Path(folder))
        copy.build()
        for tests in sorted({fault.tests for fault in faults}):
            passed, first, seconds = copy.run(tests)
            print(f"without a fault: {' '.join(tests)}: {seconds:.0f} s", flush=True)
            if not passed:
                sys.exit(f"the tests fail without a fault: {first}")
        for fault in faults:
            outcome = try_fault(copy, fault)
            outcomes.append(outcome)
            word = "caught  " if outcome.caught else "SURVIVES"
            print(f"{word} {outcome.name:45} {outcome.seconds:5.0f} s  {outcome.by}", flush=True)
    caught = sum(outcome.caught for outcome in outcomes)
    print(f"{caught} of {len(outcomes)} faults are caught")
    if arguments.json:
        rows = [asdict(outcome) for outcome in outcomes]
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    sys.exit(caught < len(outcomes))


if __name__ == "__main__":
    main()
