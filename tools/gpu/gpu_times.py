"""Times for `gpu_check`: our op, ONNX Runtime's own and a copy of the same bytes."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from gpu_models import CheckedDevice, Runner, Shape, build_model, make_inputs

TIMED_SHAPES = {
    "prompt": Shape(1, 32, 8, 2048, 128),
    "prompts": Shape(8, 32, 8, 512, 64),
    "decode": Shape(1, 32, 8, 1, 128),
    "decode, batch 16": Shape(16, 32, 8, 1, 128),
}
SMALL_SHAPES = {"small": Shape(1, 4, 2, 64, 32)}


def time_alternately(
    runs: dict[str, Callable[[], None]], checked: CheckedDevice, repeats: int
) -> dict[str, float]:
    """Return the median seconds of each, taken in turns so that all meet the same weather."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for repeat in range(repeats + 2):
        for name, run in runs.items():
            checked.wait()
            start = time.perf_counter()
            run()
            checked.wait()
            if repeat >= 2:  # The first two warm up.
                seconds[name].append(time.perf_counter() - start)
    return {name: median(values) for name, values in seconds.items()}


def measure(checked: CheckedDevice, shape: Shape, dtype: str) -> list[dict[str, Any]]:
    """Time ours, ONNX Runtime's own op and a copy, per rotation of query and key.

    Each is timed in a chain and alone; their difference takes the session's own cost out.
    """
    steps = 64 if shape.seq_len == 1 else 8
    inputs = make_inputs(checked, shape, (dtype, dtype))
    own = {**inputs, "position_ids": inputs["position_ids"].to(checked.device)}
    copies = {name: torch.empty_like(inputs[name]) for name in ("X", "key")}

    def copy(count: int) -> Callable[[], None]:
        def run() -> None:
            for _ in range(count):
                for name, to in copies.items():
                    to.copy_(inputs[name])

        return run

    def chain(count: int, ours: bool) -> Callable[[], None]:
        given = inputs if ours else own
        runner = Runner(build_model(given, ours=ours, chain=count), checked, library=ours)
        outputs = {"Y": torch.empty_like(given["X"]), "key_out": torch.empty_like(given["key"])}
        binding = runner.bind(given, outputs)
        held = (given, outputs)
        return lambda: (held, runner.session.run_with_iobinding(binding))[1]

    makers = {"ours": lambda n: chain(n, True), "ONNX Runtime": lambda n: chain(n, False)}
    makers["copy"] = copy
    runs = {(who, n): make(n) for who, make in makers.items() for n in (1, 1 + steps)}
    seconds = time_alternately(runs, checked, repeats=9)
    moved = 2 * sum(inputs[name].nbytes for name in copies)
    rows = []
    for who in makers:
        each = (seconds[who, 1 + steps] - seconds[who, 1]) / steps
        speed = moved / each / 1e9 if each > 0 else None  # Noise can make it negative.
        rows.append({"by": who, "microseconds": each * 1e6, "gigabytes_per_second": speed})
    return rows
