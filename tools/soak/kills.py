"""Kill runs that replace an output, at random and at placed moments, and look at what is left.

Each run is a child process that replaces version 0 of an output by version 1, or the reverse. Half
of them are killed after a random time. The others are killed before a file operation: a rename, an
exchange, a new folder, a deletion or an opened file. Then:

- the output must be there, whole, of one version; where folders can't be exchanged, the next run
  may have to restore it: otherwise it is lost, or mixed;
- the next run must succeed, and leave nothing else beside the output: otherwise there is rubbish.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # the children are forks of a process without threads

from kill_works import WORKS, MixedError, Work, make_sources

from rotary_export.bundle.staging import clear_interrupted
from rotary_export.errors import InterruptedWarning, RotaryExportError

ROOT = Path(__file__).parents[2]
RESULT = ROOT / "tools" / "results" / "kills.json"
EVENTS = ("os.rename", "os.mkdir", "os.remove", "os.rmdir", "open", "rotary_export.exchange")
TRIES = 20  # of a random time, until the run has not ended before


def run_child(work: Callable[[], object], seconds: float | None = None) -> int:
    """Run in a fork; kill it after some seconds.

    Returns:
        Its status, as of `os.waitpid`.
    """
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, 1)
            os.dup2(null, 2)
            warnings.simplefilter("ignore", InterruptedWarning)
            work()
            status = 0
        finally:
            os._exit(status)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
    return os.waitpid(child, 0)[1]


def watch(folder: Path, note: Callable[[str], None]) -> None:
    """Call `note` before every file operation in a folder, in this process from now on."""

    def hook(event: str, args: tuple[object, ...]) -> None:
        if event not in EVENTS:
            return
        # A deletion in a tree names only the last part of a path.
        if event == "open" and not (str(args[0]).startswith(str(folder)) and _writes(args)):
            return
        note(event)

    sys.addaudithook(hook)


def _writes(args: tuple[object, ...]) -> bool:
    flags = args[2]
    return isinstance(flags, int) and bool(flags & (os.O_WRONLY | os.O_RDWR))


def list_events(work: Work, folder: Path, version: int) -> tuple[list[str], float]:
    """Run without a kill; return the file operations and the seconds that it took."""
    file = folder.parent / "events"
    started = time.perf_counter()

    def call() -> None:
        events: list[str] = []
        watch(folder, events.append)
        work.write(folder, version)
        file.write_text("\n".join(events))

    if run_child(call):
        raise RuntimeError(f"{work.name} failed without a kill")
    return file.read_text().split("\n"), time.perf_counter() - started


def kill_placed(work: Work, folder: Path, version: int, number: int) -> int:
    """Run until before the file operation of a number."""
    count = 0

    def kill(event: str) -> None:
        nonlocal count
        count += 1
        if count == number:
            os.kill(os.getpid(), signal.SIGKILL)

    def call() -> None:
        watch(folder, kill)
        work.write(folder, version)

    return run_child(call)


def look(work: Work, folder: Path, found: Counter[str]) -> int | None:
    """Return the version of the output; count what is wrong with it."""
    try:
        return work.read(folder)[0]
    except (MixedError, KeyError, ValueError, OSError) as error:
        is_missing = not any((folder / name).exists() for name in ("out", "out.onnx", "out.npz"))
        if not is_missing:
            found["mixed"] += 1
            print(f"{work.name}: {error}", file=sys.stderr)
            return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", InterruptedWarning)
        clear_interrupted(folder / "out")  # the first thing that the next run does
    try:
        version = work.read(folder)[0]
    except (MixedError, RotaryExportError, OSError) as error:
        found["lost"] += 1
        print(f"{work.name}: {error}", file=sys.stderr)
        return None
    found["restored"] += 1
    return version


def kill_work(work: Work, sources: Path, count: int, rng: random.Random) -> dict[str, Any]:
    """Kill one work a number of times.

    Returns:
        Its row of the results.
    """
    folder = sources / "work"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    found: Counter[str] = Counter()
    version: int | None = 0
    work.write(folder, 0)  # in this process: what it imports, the forks need not import
    events, seconds = list_events(work, folder, 1)
    version = look(work, folder, found)
    for index in range(count):
        target = 1 - (version or 0)
        if index % 2:
            at = rng.choice(sorted(set(events)))
            number = rng.choice([n for n, event in enumerate(events, 1) if event == at])
            status, kind = kill_placed(work, folder, target, number), "placed"
        else:
            status, kind = _kill_at_random(work, folder, target, seconds, rng), "random"
        found[kind] += os.WIFSIGNALED(status)
        after = look(work, folder, found)
        found["new"] += after == target
        version = rng.randrange(2)
        if run_child(lambda version=version: work.write(folder, version)):
            found["failed"] += 1
            print(f"{work.name}: the next run failed", file=sys.stderr)
        found["rubbish"] += _has_rubbish(work, folder)
        version = look(work, folder, found)
    names = ("random", "placed", "new", "restored", "lost", "mixed", "rubbish", "failed")
    return {"what": work.name, **{name: found[name] for name in names}}


def _kill_at_random(
    work: Work, folder: Path, version: int, seconds: float, rng: random.Random
) -> int:
    """Kill after a random time; try again if the run ended before."""
    for _ in range(TRIES):
        delay = rng.uniform(0, seconds)
        status = run_child(lambda: work.write(folder, version), delay)
        if os.WIFSIGNALED(status):
            break
    return status


def _has_rubbish(work: Work, folder: Path) -> bool:
    names = {path.name for path in folder.iterdir()}
    try:
        rest = names - work.read(folder)[1]
    except (MixedError, RotaryExportError, OSError):
        return False  # which `look` counts
    if rest:
        print(f"{work.name}: {sorted(rest)} beside the output", file=sys.stderr)
    return bool(rest)


def kill_all(works: Iterable[Work], count: int, seed: int) -> dict[str, Any]:
    """Kill works in turn.

    Args:
        works: Of WORKS.
        count: Kills, all works together.
        seed: Of the moments.

    Returns:
        The results, as in tools/results/kills.json.
    """
    works, rng = list(works), random.Random(seed)
    rows = []
    with tempfile.TemporaryDirectory(prefix="kills.") as name:
        sources = Path(name)
        make_sources(sources)
        for index, work in enumerate(works):
            share = count // len(works) + (index < count % len(works))
            rows.append(kill_work(work, sources, share, rng))
            print(json.dumps(rows[-1]), flush=True)
    kills = sum(row["random"] + row["placed"] for row in rows)
    return {"seed": seed, "kills": kills, "rows": rows}


def main() -> None:
    """Kill, print, write the results; exit with 1 if anything was lost, mixed or left."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--kills", type=int, default=200, help="default: 200")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULT)
    arguments = parser.parse_args()
    results = kill_all(WORKS, arguments.kills, arguments.seed)
    arguments.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    bad = [r for r in results["rows"] if any(r[n] for n in ("lost", "mixed", "rubbish", "failed"))]
    sys.exit(int(bool(bad)))


if __name__ == "__main__":
    main()
