"""Cost per element against the length, for bench.py: its table, its flatness, its plot."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bench_cases import Result, make_copy, time_on
from bench_graphs import OURS, PEERS, BenchCase, make_runner

from rotary_export.measure.timing import Goal, Spread, divide

LENGTHS_CASE = "cost per element"
LENGTHS = tuple(2**k for k in range(0, 17))
FLAT_FROM = 512
FLAT = Goal(1.15, is_maximum=True)
RUNS = (OURS, *PEERS, "copy")

Lengths = dict[int, dict[str, Spread]]


def choose_lengths(quick: bool) -> list[int]:
    """Return the lengths whose tensors fit into the memory that is free."""
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    tensors = 1 + len(RUNS)  # the inputs, and the outputs of each
    longest = 8192 if quick else LENGTHS[-1]
    return [
        n
        for n in LENGTHS
        if n <= longest and 4 * BenchCase(seq_len=n).elements * tensors < 0.7 * free
    ]


def measure_lengths(lengths: list[int], seconds: float) -> Lengths:
    """Time query (1, 32, S, 128) with key (1, 8, S, 128), one thread, for each S."""
    found = {}
    for seq_len in lengths:
        case = BenchCase(seq_len=seq_len)
        calls: dict[str, Any] = {op: make_runner(case, op) for op in (OURS, *PEERS)}
        calls["copy"] = make_copy(case)
        found[seq_len] = time_on(1, calls, seconds)
    return found


def measure_flatness(found: Lengths, seconds: float) -> Iterator[Result]:
    """Compare our cost per element of the dearest length with that of the cheapest.

    Args:
        found: As `measure_lengths`.
        seconds: About how long it may take.
    """
    cases = {str(n): BenchCase(seq_len=n) for n in found if n >= FLAT_FROM}
    if len(cases) < 2:
        return
    times = time_on(1, {n: make_runner(p, OURS) for n, p in cases.items()}, seconds)
    costs = {
        n: Spread(tuple(t / cases[n].elements for t in spread.values))
        for n, spread in times.items()
    }
    dearest = max(costs, key=lambda n: costs[n].median)
    cheapest = min(costs, key=lambda n: costs[n].median)
    what = f"S = {dearest} / S = {cheapest}, of {', '.join(costs)}"
    ratio = divide(costs[dearest], costs[cheapest])
    copies = [found[int(n)]["copy"].median / cases[n].elements for n in (dearest, cheapest)]
    yield Result(LENGTHS_CASE, what, FLAT, ratio, times, Spread((copies[0] / copies[1],)))


def list_costs(found: Lengths) -> list[dict[str, float]]:
    """Return one row per length, for JSON: median nanoseconds per element by runner."""
    return [
        {"seq_len": seq_len}
        | {
            name: float(f"{1e9 * spread.median / BenchCase(seq_len=seq_len).elements:.4g}")
            for name, spread in times.items()
        }
        for seq_len, times in found.items()
    ]


def plot_costs(costs: list[dict[str, float]], title: str, file: Path) -> None:
    """Draw time per element against size.

    Args:
        costs: As `list_costs`.
        title: The machine.
        file: The .png to write.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5))
    megabytes = [4 * BenchCase(seq_len=int(row["seq_len"])).elements / 1e6 for row in costs]
    styles = {OURS: "o-", "copy": "k--"}
    for name in RUNS:
        axes.plot(megabytes, [row[name] for row in costs], styles.get(name, ".-"), label=name)
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="query (1, 32, S, 128) and key (1, 8, S, 128), float32: MB",
        ylabel="ns per element, one thread",
        title=title,
    )
    axes.grid(True, which="both", alpha=0.3)
    axes.legend()
    figure.savefig(file, dpi=120, bbox_inches="tight")
    pyplot.close(figure)
