"""Call the operator very often: random calls under sanitizers, from many threads, in many sessions.

    python tools/soak/op_calls.py --json tools/results/op_calls.json

Random calls are those of tests/helpers/kernel_sweep.cc, which compares each result with an oracle
of its own. They run under AddressSanitizer and UndefinedBehaviorSanitizer, and again with each
buffer between pages that can't be accessed: a sanitizer does not see each load of AVX-512. Threads
share one session of ONNX Runtime, and each result is compared to the bit. Sessions are loaded and
dropped one after the other, and the memory that stays is measured.
"""

from __future__ import annotations

import argparse
import functools
import gc
import json
import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np

import rotary_export

ROOT = Path(__file__).parent.parent.parent
BUNDLE = ROOT / "exported" / "xpos"
SANITIZERS, GUARDS = "sanitizers", "guard pages"
FLAGS = {
    SANITIZERS: "-fsanitize=address,undefined -fno-sanitize-recover=all",
    GUARDS: "-DKERNEL_SWEEP_GUARD_PAGES",
}
SWEEPS = (
    ("baseline", SANITIZERS),
    ("avx2", SANITIZERS),
    ("avx2", GUARDS),
    ("avx512", GUARDS),
    ("avx512bf16", GUARDS),
)


def build_sweep(watched: str) -> Path:
    """Build kernel_sweep.cc under sanitizers or with guard pages; return the program."""
    folder = ROOT / "build" / "soak" / watched.replace(" ", "_")
    options = {
        "CMAKE_BUILD_TYPE": "Release",
        "CMAKE_CXX_FLAGS": FLAGS[watched],
        "ROTARY_EXPORT_KERNEL_SWEEP": "ON",
    }
    settings = [f"-D{name}={value}" for name, value in options.items()]
    configure = ["cmake", "-S", ROOT / "rotary_export" / "csrc", "-B", folder, *settings]
    for command in (configure, ["cmake", "--build", folder, "--target", "kernel_sweep"]):
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return folder / "kernel_sweep"


def sweep(isa: str, watched: str, seed: int, count: int) -> dict[str, Any]:
    """Make random calls with one instruction set, if this machine has it."""
    done = subprocess.run(
        [build_sweep(watched), str(seed), str(count)],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"ROTARY_EXPORT_ISA": isa},
    )
    found: dict[str, Any] = {"what": f"random calls, {isa}, {watched}", "done": 0, "wrong": []}
    printed = done.stdout + done.stderr
    if re.match(rf"ROTARY_EXPORT_ISA .* on this machine, got {isa}\n", printed):
        found["not_run"] = f"this machine has no {isa}"
    elif done.returncode:
        found["wrong"].append(printed[-2000:])
    else:
        found["done"] = int(printed.split()[0])
    return found


def draw_inputs(session: Any, draw: np.random.Generator) -> dict[str, np.ndarray]:
    """Draw a few tokens for the committed bundle with xPos."""
    batch, seq = draw.integers(1, 4, 2)
    feeds = {}
    for info in session.graph.inputs[:2]:
        heads, channels = info.shape[1], info.shape[3]
        feeds[info.name] = draw.standard_normal((batch, heads, seq, channels)).astype(np.float32)
    feeds["position_ids"] = draw.integers(0, 64, (batch, seq))
    return feeds


def run_threads(threads: int, count: int, seed: int) -> dict[str, Any]:
    """Call one session from many threads; each result must have the bits of a single thread's."""
    session = rotary_export.load(BUNDLE, require_fused=True)
    draw = np.random.default_rng(seed)
    cases = [draw_inputs(session, draw) for _ in range(64)]
    expected = [session(**case) for case in cases]
    wrong: list[str] = []
    done = [0] * threads

    def work(thread: int) -> None:
        order = np.random.default_rng([seed, thread]).integers(0, len(cases), count)
        for number in order:
            try:
                got = session(**cases[number])
            except Exception as error:
                wrong.append(f"thread {thread}: {type(error).__name__}: {error}")
                return
            same = all(np.array_equal(got[n], y) for n, y in expected[number].items())
            if not same:
                wrong.append(f"thread {thread}, case {number}")
            done[thread] += 1

    workers = [threading.Thread(target=work, args=(thread,)) for thread in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return {"what": f"calls of one session, {threads} threads", "done": sum(done), "wrong": wrong}


def read_memory() -> float:
    """Return the resident memory of this process, in MiB."""
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def run_sessions(count: int, seed: int) -> dict[str, Any]:
    """Load a bundle, call it and drop it, many times."""
    draw = np.random.default_rng(seed)
    first = rotary_export.load(BUNDLE, require_fused=True)
    case = draw_inputs(first, draw)
    expected = first(**case)
    wrong, before = [], 0.0
    for number in range(count):
        session = rotary_export.load(BUNDLE, require_fused=True)
        got = session(**case)
        if not all(np.array_equal(got[n], y) for n, y in expected.items()):
            wrong.append(f"session {number}")
        del session, got
        if number == count // 10:  # the allocator has its working size
            before = read_memory()
    grown = read_memory() - before
    what = "sessions, loaded and dropped"
    return {"what": what, "done": count, "wrong": wrong, "growth_mib": round(grown, 2)}


def soak(calls: int, threads: int, per_thread: int, sessions: int, seed: int) -> dict[str, Any]:
    """Run all; return the counts and what was found, as the JSON has it."""
    works = {
        **{" ".join(pair): functools.partial(sweep, *pair, seed, calls) for pair in SWEEPS},
        "threads": lambda: run_threads(threads, per_thread, seed),
        "sessions": lambda: run_sessions(sessions, seed),
    }
    rows = []
    for name, work in works.items():
        print(f"{name} ...", file=sys.stderr)
        started = time.monotonic()
        rows.append(work() | {"seconds": round(time.monotonic() - started, 1)})
    return {"seed": seed, "rows": rows}


def main() -> int:
    """Read the command line; the exit code is 1 if something is wrong."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--calls", type=int, default=1_000_000, help="Of each instruction set.")
    parser.add_argument("--threads", type=int, default=16)
    parser.add_argument("--per-thread", type=int, default=100_000, help="Calls of a thread.")
    parser.add_argument("--sessions", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="File to write.")
    given = parser.parse_args()
    found = soak(given.calls, given.threads, given.per_thread, given.sessions, given.seed)
    written = json.dumps(found, indent=1) + "\n"
    print(written, end="")
    if given.json:
        given.json.write_text(written)
    return int(any(row["wrong"] for row in found["rows"]))


if __name__ == "__main__":
    sys.exit(main())
