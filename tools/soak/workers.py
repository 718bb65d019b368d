"""Try many numbered cases in processes, one of which may end by a signal."""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import resource
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

MEMORY = 12 << 30  # of address space: a size that is not checked is a MemoryError, not a kill
LIMIT_S = 120  # for one case

# Called with a number and what to call with the current step; returns counts and findings.
Try = Callable[[int, Callable[[str], None]], tuple[Counter[str], dict[str, list[str]]]]


@dataclass
class Found:
    """What was found.

    Attributes:
        done: Number of cases.
        counts: Of outcomes, by name.
        findings: What is wrong, by kind; "signals" and "timeouts" are found here.
    """

    done: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    findings: dict[str, list[str]] = field(default_factory=lambda: {"signals": [], "timeouts": []})


def run_command(
    text: str, count: int, kinds: Sequence[str], soak: Callable[..., dict[str, Any]]
) -> int:
    """Read the command line of a tool, try its cases, print and write what was found.

    Args:
        text: What the tool does.
        count: Default number of cases.
        kinds: Of findings, beside "signals" and "timeouts".
        soak: Tries cases: called with the first number, the count, the seed, the number of
            processes and the seconds.

    Returns:
        The exit code: 1 if something was found.
    """
    parser = argparse.ArgumentParser(description=text.partition("\n")[0])
    parser.add_argument("--count", type=int, default=count)
    parser.add_argument("--first", type=int, default=0, help="Number of the first case.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=1e9, help="Stop after so long.")
    parser.add_argument("--json", type=Path, help="File to write.")
    given = parser.parse_args()
    found = soak(given.first, given.count, given.seed, given.jobs, given.seconds)
    written = json.dumps(found, indent=1) + "\n"
    print(written, end="")
    if given.json:
        given.json.write_text(written)
    return int(any(found[kind] for kind in (*kinds, "signals", "timeouts")))


def run_apart(function: Callable[..., None], *arguments: Any) -> None:
    """Run a function in a process of its own.

    Raises:
        RuntimeError: It failed.
    """
    process = multiprocessing.get_context("fork").Process(target=function, args=arguments)
    process.start()
    process.join()
    if process.exitcode:
        raise RuntimeError(f"{function.__name__} ended with {process.exitcode}")


def try_all(try_one: Try, numbers: Sequence[int], jobs: int, seconds: float) -> Found:
    """Try each number, in processes; one that ends by a signal is replaced.

    Args:
        try_one: Tries one.
        numbers: What to try.
        jobs: Number of processes.
        seconds: Time after which no further number is tried.
    """
    found, end = Found(), time.time() + seconds
    shares = [[*numbers[job::jobs]] for job in range(jobs)]
    cores = sorted(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory(prefix="soak-") as name:
        files = [Path(name, f"{job}.jsonl") for job in range(jobs)]
        workers: dict[int, Any] = {}

        def start(job: int) -> None:
            files[job].write_text("")
            context = multiprocessing.get_context("fork")
            arguments = (try_one, shares[job], files[job], cores[job % len(cores)], end)
            workers[job] = context.Process(target=_work, args=arguments)
            workers[job].start()

        for job in range(jobs):
            start(job)
        while workers:
            time.sleep(0.2)
            for job, worker in [*workers.items()]:
                if worker.is_alive():
                    continue
                del workers[job]
                _collect(found, files[job], shares[job], worker.exitcode)
                if shares[job] and time.time() < end:
                    start(job)
    return found


def _work(try_one: Try, numbers: Sequence[int], file: Path, core: int, end: float) -> None:
    """Try numbers in this process; the file gets a line of JSON for each step."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.sched_setaffinity(0, {core})  # ONNX Runtime's threads would only spin
    with open(os.devnull, "w") as silent:
        os.dup2(silent.fileno(), 2)
    with file.open("a") as stream:

        def write(line: dict[str, Any]) -> None:
            print(json.dumps(line), file=stream, flush=True)

        for number in numbers:
            if time.time() > end:
                return
            signal.alarm(LIMIT_S)  # ends the process
            counts, findings = try_one(number, lambda step: write({"step": step}))
            write({"number": number, "counts": counts, "findings": findings})
        signal.alarm(0)


def _collect(found: Found, file: Path, share: list[int], code: int) -> None:
    """Add what a process has found; a number that ended it is done."""
    step = ""
    for line in map(json.loads, file.read_text().splitlines()):
        if "step" in line:
            step = line["step"]
            continue
        found.done += 1
        found.counts.update(line["counts"])
        for kind, texts in line["findings"].items():
            found.findings.setdefault(kind, []).extend(texts)
        share.remove(line["number"])
    if code == -signal.SIGALRM:
        found.findings["timeouts"].append(step)
    elif code:
        found.findings["signals"].append(f"{step}: exit code {code}")
    if code:
        found.done += 1
        del share[:1]
    print(f"{found.done} are done", file=sys.stderr)
