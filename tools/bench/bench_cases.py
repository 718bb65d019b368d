"""The measurements of bench.py, one function per kind; `CASES` at the end lists them all."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from bench_arena import count_buffers
from bench_graphs import (
    OURS,
    PEERS,
    BenchCase,
    Runner,
    library_with,
    make_runner,
)

from rotary_export.measure.timing import (
    Call,
    Goal,
    Spread,
    add,
    divide,
    subtract,
    time_interleaved,
)

NEVER_STREAM = ("ROTARY_EXPORT_STREAMING_BYTES", str(2**62))
NEVER_SLOWER = Goal(1.0, slack=0.03)

Times = dict[str, Spread]


@dataclass(frozen=True)
class Result:
    """One ratio.

    Attributes:
        case: What was measured.
        ratio_of: What the ratio is, in words.
        goal: Asked of it; None: nothing.
        ratio: Measured.
        times: Seconds by runner.
        of_copy: The same ratio if our op took the time of a plain copy of query and key, which
            is what the machine's memory gives; None: there is no such thing.
    """

    case: str
    ratio_of: str
    goal: Goal | None
    ratio: Spread
    times: Times = field(default_factory=dict)
    of_copy: Spread | None = None

    @property
    def verdict(self) -> str:
        """As `Goal.judge`."""
        return self.goal.judge(self.ratio) if self.goal else ""

    def to_dict(self) -> dict[str, Any]:
        """Return the result as JSON accepts it."""
        return {
            "case": self.case,
            "ratio of": self.ratio_of,
            "asked": str(self.goal) if self.goal else "",
            **self.ratio.to_dict(),
            "verdict": self.verdict,
            "of a copy": self.of_copy.to_dict()["median"] if self.of_copy else None,
            "seconds": {name: spread.to_dict() for name, spread in self.times.items()},
        }


Measure = Callable[[str, float], Iterator[Result]]  # (name of the case, seconds)


def make_copy(case: BenchCase) -> Call:
    """Return a plain copy of query and key to memory that is there."""
    given = [case.inputs[name] for name in ("query", "key")]
    copies = [torch.zeros_like(x) for x in given]

    def copy() -> None:
        for to, x in zip(copies, given, strict=True):
            to.copy_(x)

    return copy


def time_on(threads: int, calls: Mapping[str, Call], seconds: float) -> Times:
    """Time calls that use so many threads: one by its processor time, more by the wall clock."""
    torch.set_num_threads(threads)
    clock = time.thread_time if threads == 1 else time.perf_counter
    return time_interleaved(calls, seconds, clock=clock)


def check_equal(runners: Mapping[str, Runner]) -> None:
    """Refuse to time what computes something else: the results agree to a few roundings."""
    for runner in runners.values():
        runner()
    want = list(runners[OURS].outputs.values())
    for name, runner in runners.items():
        for got, value in zip(runner.outputs.values(), want, strict=True):
            size = float(value.abs().max())
            tolerance = 8 * torch.finfo(value.dtype).eps * max(size, 1.0)
            difference = float((got.double() - value.double()).abs().max())
            if not difference <= tolerance:
                raise AssertionError(f"{name} differs from {OURS} by {difference}")


def pick_faster_peer(times: Times) -> str:
    """Return the faster of ORT's two ops."""
    return min((p for p in PEERS if p in times), key=lambda peer: times[peer].median)


def measure_op(
    name: str,
    seconds: float,
    *,
    case: BenchCase,
    threads: int,
    peer: Goal | None,
    copy: Goal | None,
) -> Iterator[Result]:
    """Compare one node with two nodes of ORT's, and with a copy of the same bytes."""
    ops = (OURS,) if case.dtype == torch.bfloat16 else (OURS, *PEERS)
    runners = {op: make_runner(case, op, threads) for op in ops}
    check_equal(runners)
    times = time_on(threads, {**runners, "copy": make_copy(case)}, seconds)
    if len(ops) > 1:
        faster = pick_faster_peer(times)
        ratio = divide(times[faster], times[OURS])
        of_copy = divide(times[faster], times["copy"])
        yield Result(name, f"times as fast as {faster}", peer, ratio, times, of_copy)
    ratio = divide(times["copy"], times[OURS])
    yield Result(name, "times as fast as a copy", copy, ratio, times)


def time_per_node(
    case: BenchCase, ops: Mapping[str, Mapping[str, Any]], chain: int, seconds: float
) -> Times:
    """Time one node as (chain - 1 node) / (length - 1): the session's own time drops out.

    Args:
        case: Sizes and types.
        ops: By name: arguments of `make_runner`.
        chain: Nodes in the chain.
        seconds: About how long it may take.
    """
    calls = {}
    for name, options in ops.items():
        calls[f"{name} x1"] = make_runner(case, **options)
        calls[f"{name} x{chain}"] = make_runner(case, chain=chain, **options)
    times = time_on(1, calls, seconds)
    return {
        name: subtract(times[f"{name} x{chain}"], times[f"{name} x1"], chain - 1) for name in ops
    }


def measure_decode(name: str, seconds: float, *, case: BenchCase, goal: Goal) -> Iterator[Result]:
    """Compare one node with two of ORT's where one token is rotated."""
    times = time_per_node(case, {op: {"op": op} for op in (OURS, *PEERS)}, 65, seconds)
    faster = pick_faster_peer(times)
    ratio = divide(times[OURS], times[faster])
    yield Result(name, f"time relative to {faster}", goal, ratio, times)


def measure_in_place(name: str, seconds: float, *, case: BenchCase, goal: Goal) -> Iterator[Result]:
    """Compare our node in place with our node out of place, both between two others."""
    between = {"negate": True, "sum_outputs": True}
    graphs = {"without": {"chain": 0}, "in place": {}, "out of place": {"tapped": True}}
    calls = {n: make_runner(case, OURS, **between, **graph) for n, graph in graphs.items()}
    times = time_on(1, calls, 2 * seconds)
    without = times.pop("without")
    times = {name: subtract(spread, without) for name, spread in times.items()}
    ratio = divide(times["out of place"], times["in place"])
    yield Result(name, "times as fast as out of place", goal, ratio, times)


def measure_memory(name: str, seconds: float) -> Iterator[Result]:
    """Count the buffers that ORT allocates for the op between two others."""
    for mode, goal in (("in place", Goal(0.1, is_maximum=True)), ("out of place", None)):
        buffers = Spread((count_buffers(mode),))
        yield Result(name, f"buffers that the op adds, {mode}", goal, buffers)


def measure_reader(name: str, seconds: float, *, case: BenchCase) -> Iterator[Result]:
    """Compare op + ReduceSum over its output with ORT's, and with ours without streaming stores."""
    graph = {"sum_outputs": True}
    calls: dict[str, Call] = {op: make_runner(case, op, **graph) for op in (OURS, *PEERS)}
    calls |= {"reader": make_runner(case, OURS, chain=0, **graph), "copy": make_copy(case)}
    with library_with(*NEVER_STREAM) as library:
        calls["plain stores"] = make_runner(case, OURS, library=library, **graph)
    times = time_on(1, calls, seconds)
    faster = pick_faster_peer(times)
    ratio = divide(times[faster], times[OURS])
    of_copy = divide(times[faster], add(times["reader"], times["copy"]))
    yield Result(name, f"times as fast as {faster} + reader", Goal(1.3), ratio, times, of_copy)
    ratio = divide(times["plain stores"], times[OURS])
    yield Result(name, "times as fast as with plain stores", NEVER_SLOWER, ratio, times)


def measure_eager(
    name: str, seconds: float, *, threads: int, keeps_memory: bool
) -> Iterator[Result]:
    """Compare torch's eager op with `x * cos + rotate_half(x) * sin`."""
    from bench_eager import allocator_that_keeps_memory, make_eager_calls

    with allocator_that_keeps_memory(keeps_memory):
        times = time_on(threads, make_eager_calls(), seconds)
    ratio = divide(times["plain torch"], times["op"])
    of_copy = divide(times["plain torch"], times["copy"])
    what = "times as fast as x*cos + rotate_half(x)*sin"
    yield Result(name, what, Goal(10), ratio, times, of_copy)


def _make_cases() -> Iterator[tuple[str, Measure]]:
    large, small = BenchCase(), BenchCase(8, 32, 32, 512, 64)
    shapes = {"(1, 32, 2048, 128)": large, "(8, 32, 512, 64)": small}

    def op(what: str, **options: Any) -> tuple[str, Measure]:
        return what, functools.partial(measure_op, **options)

    for interleaved, layout in enumerate(("half", "interleaved")):
        for shape, base in shapes.items():
            case = replace(base, interleaved=bool(interleaved))
            faster = Goal(3.5 if base is large else 3.0)
            what = f"float32 {layout} {shape}"
            yield op(f"{what} 1 thread", case=case, threads=1, peer=faster, copy=Goal(1))
            yield op(f"{what} 2 threads", case=case, threads=2, peer=Goal(2.2), copy=None)
            for dtype in (torch.float16, torch.bfloat16):
                what = f"{str(dtype).removeprefix('torch.')} {layout} {shape} 1 thread"
                typed = replace(case, dtype=dtype)
                yield op(what, case=typed, threads=1, peer=Goal(4), copy=Goal(0.85))
        for shape, base in shapes.items():
            case = replace(base, interleaved=bool(interleaved))
            kinds = {"xPos": {"use_xpos": True}, "partial": {"rotary_dim": base.head_dim // 4}}
            for what, change in kinds.items():
                what = f"{what} {layout} {shape} 1 thread"
                changed = replace(case, **change)
                yield op(what, case=changed, threads=1, peer=Goal(3), copy=None)
        cached = BenchCase(seq_len=128, interleaved=bool(interleaved))
        what = f"in cache {layout} (1, 32, 128, 128) 1 thread"
        yield op(what, case=cached, threads=1, peer=Goal(1.25), copy=None)
        for batch_size, limit in ((1, 0.72), (16, 0.75)):
            token = BenchCase(batch_size, seq_len=1, interleaved=bool(interleaved))
            goal = Goal(limit, is_maximum=True)
            what = f"decode {layout} batch {batch_size}"
            yield what, functools.partial(measure_decode, case=token, goal=goal)
    for megabytes in (0.5, 2, 8, 32, 64):
        sized = BenchCase(seq_len=int(64 * megabytes))
        goal = Goal(1.5) if megabytes >= 32 else NEVER_SLOWER
        what = f"in place {megabytes:g} MB"
        yield what, functools.partial(measure_in_place, case=sized, goal=goal)
    yield "in place, memory", measure_memory
    for megabytes in (0.5, 1, 2, 4, 8, 16, 32, 64):
        sized = BenchCase(seq_len=int(64 * megabytes))
        yield f"reader {megabytes:g} MB", functools.partial(measure_reader, case=sized)
    for threads in (1, 2):
        for keeps, what in ((False, "fresh memory"), (True, "memory kept by the allocator")):
            call = functools.partial(measure_eager, threads=threads, keeps_memory=keeps)
            yield f"torch eager, {what}, threads {threads}", call


CASES: dict[str, Measure] = dict(_make_cases())
