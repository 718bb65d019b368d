"""Time the fused op against ONNX Runtime's own, plain torch and a copy; say what was asked of it.

Everything runs in one process, in turns (ours, peer, ours, peer, ...), with preallocated outputs
through IO binding and the same number of threads. What is compared are medians of the ratios of
neighbouring runs. What one thread does is timed by its processor time, so that other processes
disturb less; more threads, by the wall clock. Numbers from a busy machine still say little: the
tool warns, and says "unsure" where the uncertainty reaches what was asked. "Of a copy" is the same
ratio if our op took the time of a plain copy of query and key: about what the memory allows.

Exit codes: 0 fine, 1 something asked was missed, 2 wrong usage.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from pathlib import Path
from typing import Any

import bench_environment  # noqa: F401 (before torch)
import torch
from bench_cases import CASES, Result, make_copy
from bench_graphs import BenchCase
from bench_lengths import (
    LENGTHS_CASE,
    choose_lengths,
    list_costs,
    measure_flatness,
    measure_lengths,
    plot_costs,
)
from bench_share import SHARE_CASES, Share, measure_shares

from rotary_export.cli.terminal import Terminal
from rotary_export.measure.machine import describe_machine
from rotary_export.measure.timing import SECONDS, describe_noise, measure_noise

QUICK_SECONDS = 0.2
UNCERTAIN = 0.2  # of a ratio's median
CLOCKS = {"1 thread": (1, time.thread_time), "2 threads": (2, time.perf_counter)}
HEADERS = ("case", "ratio", "asked", "min", "median", "max", "of a copy", "")
SHARE_HEADERS = ("rope's share of a decoder layer", "with", "share", "rope us", "layer us")


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer rounds, smaller tensors")
    parser.add_argument("--only", metavar="PATTERN", default="", help="a regular expression")
    parser.add_argument("--list", action="store_true", help="only name the cases")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="time per element by size")
    arguments = parser.parse_args()
    try:
        pattern = re.compile(arguments.only)
    except re.error as error:
        parser.error(f"--only {arguments.only!r}: {error}")
    names = (*SHARE_CASES, *CASES, LENGTHS_CASE)
    arguments.names = [name for name in names if pattern.search(name)]
    if not arguments.names:
        parser.error(f"--only {arguments.only!r} matches no case (--list names them)")
    if arguments.plot and LENGTHS_CASE not in arguments.names:
        parser.error(f"--plot needs the case {LENGTHS_CASE!r}")
    if arguments.plot and arguments.plot.suffix != ".png":
        parser.error(f"--plot writes a .png, got {arguments.plot}")
    for file in (arguments.json, arguments.plot):
        if file and not file.parent.is_dir():
            parser.error(f"{file.parent} is no folder")
    return arguments


def measure_noises(seconds: float) -> dict[str, float]:
    """Return how far identical copies differ, by either clock."""
    noises = {}
    for name, (threads, clock) in CLOCKS.items():
        torch.set_num_threads(threads)
        noises[name] = measure_noise(make_copy(BenchCase()), seconds, clock=clock)
    return noises


def list_uncertain(results: list[Result]) -> list[str]:
    """Return a warning that names the cases whose ratios the machine was too busy for."""
    names = dict.fromkeys(r.case for r in results if r.ratio.uncertainty > UNCERTAIN)
    return [f"uncertain by more than {UNCERTAIN:.0%}: {'; '.join(names)}"] if names else []


def run(names: list[str], quick: bool, terminal: Terminal) -> dict[str, Any]:
    """Measure cases; return all numbers, as JSON accepts them."""
    seconds = QUICK_SECONDS if quick else SECONDS
    results: list[Result] = []
    shares: list[Share] = []
    costs: list[dict[str, float]] = []
    with terminal.progress() as progress:
        progress("noise")
        noise = [measure_noises(seconds)]
        for index, name in enumerate(names, 1):
            progress(f"{index} of {len(names)}: {name}")
            if name in SHARE_CASES:
                shares += measure_shares(*SHARE_CASES[name], seconds)
            elif name == LENGTHS_CASE:
                lengths = measure_lengths(choose_lengths(quick), seconds)
                costs = list_costs(lengths)
                results += measure_flatness(lengths, 4 * seconds)
            else:
                results += CASES[name](name, seconds)
        progress("noise, again")
        noise.append(measure_noises(seconds))
    worst = {name: max(found[name] for found in noise) for name in CLOCKS}
    warnings = {name: describe_noise(value) for name, value in worst.items()}
    return {
        "machine": describe_machine(),
        "quick": quick,
        "noise": {name: round(value, 4) for name, value in worst.items()},
        "warnings": [f"{name}: {warning}" for name, warning in warnings.items() if warning]
        + list_uncertain(results),
        "shares": [share.to_dict() for share in shares],
        "results": [result.to_dict() for result in results],
        "costs": costs,
    }


def print_tables(found: dict[str, Any], terminal: Terminal) -> None:
    """Print what `run` found."""
    if found["shares"]:
        rows = [
            (
                f"{s['model']}, {s['phase']}",
                s["op"],
                f"{s['share']:.2%}",
                *(_us(s, x) for x in ("rope", "layer")),
            )
            for s in found["shares"]
        ]
        terminal.table(SHARE_HEADERS, rows)
        terminal.line("")
    if found["results"]:
        keys = ("case", "ratio of", "asked", "min", "median", "max", "of a copy", "verdict")
        cells = [["" if r[key] is None else r[key] for key in keys] for r in found["results"]]
        rows = [[f"{c:.3g}" if isinstance(c, float) else c for c in row] for row in cells]
        terminal.table(HEADERS, rows)
        verdicts = [r["verdict"] for r in found["results"]]
        counts = {v: verdicts.count(v) for v in ("ok", "missed", "unsure")}
        terminal.line(", ".join(f"{count} {verdict}" for verdict, count in counts.items()))
    if found["costs"]:
        terminal.line("\nnanoseconds per element, one thread")
        rows = [list(row.values()) for row in found["costs"]]
        terminal.table(list(found["costs"][0]), rows)
    machine = found["machine"]
    terminal.line(f"{machine['processor']}, {machine['instruction set']}")
    for warning in found["warnings"]:
        terminal.line(f"warning: {warning}")


def format_json(found: dict[str, Any]) -> str:
    """Return JSON with one line per measurement, to be read and compared."""
    parts = []
    for name, value in found.items():
        text = json.dumps(value)
        if isinstance(value, list) and value:
            text = "[\n  " + ",\n  ".join(map(json.dumps, value)) + "\n ]"
        parts.append(f' "{name}": {text}')
    return "{\n" + ",\n".join(parts) + "\n}\n"


def _us(share: dict[str, Any], name: str) -> str:
    return f"{1e6 * share['seconds'][name]['median']:.3g}"


def main() -> int:
    """Measure, print, write."""
    arguments = parse_arguments()
    terminal = Terminal(as_json=False)
    if arguments.list:
        for name in arguments.names:
            terminal.line(name)
        return 0
    found = run(arguments.names, arguments.quick, terminal)
    print_tables(found, terminal)
    if arguments.json:
        arguments.json.write_text(format_json(found), encoding="utf-8")
    if arguments.plot:
        machine = found["machine"]
        title = f"{machine['processor']}, {machine['instruction set']}"
        plot_costs(found["costs"], title, arguments.plot)
    return int(any(result["verdict"] == "missed" for result in found["results"]))


if __name__ == "__main__":
    sys.exit(main())
