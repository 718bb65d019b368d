"""Measure a decode step of the C++ kit against Python's, in one ONNX Runtime, fused and portable.

tools/bench/measure_cpp_latency.py BUILD [--bundle DIR] [--seconds S] [--json FILE]

BUILD is the build folder of the kit cpp-onnxruntime. Its program and a raw session of
Python's onnxruntime do the same: buffers of one token are bound once; a step copies one token in,
runs, and copies the result out. The session of `rotary_export.load` takes no buffers: its steps
are given arrays that were cut out beforehand. The three take turns, and what counts is the ratio
of neighbours.
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import onnxruntime

import rotary_export
from rotary_export.bundle.manifest import find_main_graph, read_manifest
from rotary_export.measure.machine import describe_machine
from rotary_export.measure.timing import Spread, divide
from rotary_export.proof.sample_inputs import make_inputs
from rotary_export.runtime import op_library_path

BATCH_SIZES = (1, 16)
TOKENS = 64
STEPS = 200  # in one sample
PAUSE = 5e-3  # for threads that go on spinning after a run
AXIS = {"query": 2, "key": 2, "position_ids": 1}

Arrays = dict[str, np.ndarray]
Sample = Callable[[int], float]  # steps -> seconds of one


@contextmanager
def run_program(program: Path, file: Path, inputs: Arrays, fused: bool) -> Iterator[Sample]:
    """Start `rotary_run time`, which times as many steps as it is told to."""
    runtime = next(Path(onnxruntime.__file__).parent.glob("capi/libonnxruntime.so.*"))
    with tempfile.TemporaryDirectory() as folder:
        for name, value in inputs.items():
            np.save(Path(folder) / f"{name}.npy", value)
        words = ["time", runtime, file, folder, f"{folder}/out", *[op_library_path()] * fused]
        command = list(map(str, (program, *words)))
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        with subprocess.Popen(command, **pipes) as process:

            def sample(steps: int) -> float:
                process.stdin.write(f"{steps}\n")
                process.stdin.flush()
                return float(process.stdout.readline())

            yield sample
            process.stdin.close()


def time_steps(step: Callable[[], object], steps: int) -> float:
    start = time.perf_counter()
    for _ in range(steps):
        step()
    return (time.perf_counter() - start) / steps


def make_session_step(bundle: Path, inputs: Arrays, fused: bool) -> Callable[[], object]:
    session = rotary_export.load(
        bundle, "rotate", providers=["CPUExecutionProvider"], use_op_library=fused
    )
    tokens = itertools.cycle(
        [{k: v.take([token], axis=AXIS[k]) for k, v in inputs.items()} for token in range(TOKENS)]
    )
    return lambda: session(**next(tokens))


def make_raw_step(file: Path, inputs: Arrays, fused: bool) -> Callable[[], object]:
    options = onnxruntime.SessionOptions()
    if fused:
        options.register_custom_ops_library(str(op_library_path()))
    session = onnxruntime.InferenceSession(str(file), options, ["CPUExecutionProvider"])
    results = {f"{name}_out": np.empty_like(inputs[name]) for name in ("query", "key")}
    binding = session.io_binding()

    def bind(arrays: Arrays, bind_one: Callable[..., None]) -> list[tuple[np.ndarray, np.ndarray]]:
        """Bind memory of one token of each; return (view of all with the token first, memory)."""
        pairs = []
        for name, value in arrays.items():
            whole = np.moveaxis(value, AXIS.get(name, 2), 0)
            memory = np.empty_like(value.take([0], axis=AXIS.get(name, 2)))
            bind_one(name, "cpu", 0, memory.dtype, memory.shape, memory.ctypes.data)
            pairs.append((whole, memory.reshape(whole.shape[1:])))
        return pairs

    fed, kept = bind(inputs, binding.bind_input), bind(results, binding.bind_output)
    tokens = itertools.cycle(range(TOKENS))

    def step() -> None:
        token = next(tokens)
        for whole, memory in fed:
            memory[...] = whole[token]
        session.run_with_iobinding(binding)
        for whole, memory in kept:
            whole[token] = memory

    return step


def measure(program: Path, bundle: Path, batch_size: int, fused: bool, seconds: float) -> dict:
    """Return the row of one batch size."""
    manifest = read_manifest(bundle)
    inputs = dict(make_inputs(manifest, find_main_graph(bundle, manifest), batch_size, TOKENS))
    file = bundle / manifest.graphs["rotate"].files["onnx"]
    steps = {
        "session": make_session_step(bundle, inputs, fused),
        "raw": make_raw_step(file, inputs, fused),
    }
    times: dict[str, list[float]] = {"C++": [], **{name: [] for name in steps}}
    with run_program(program, file, inputs, fused) as sample:
        calls: dict[str, Sample] = {"C++": sample}
        calls |= {name: lambda n, s=step: time_steps(s, n) for name, step in steps.items()}
        for call in calls.values():
            call(STEPS)
        end = time.perf_counter() + seconds
        while len(times["C++"]) < 9 or time.perf_counter() < end:
            for name, call in calls.items():
                time.sleep(PAUSE)
                times[name].append(call(STEPS))
    spreads = {name: Spread(tuple(values)) for name, values in times.items()}
    row = {"batch_size": batch_size, "path": "fused" if fused else "portable"}
    row |= {f"{name} us": round(1e6 * s.median, 2) for name, s in spreads.items()}
    for name in steps:
        ratio = divide(spreads["C++"], spreads[name])
        row[f"C++ / {name}"] = round(ratio.median, 3)
        row[f"C++ / {name}, 95 %"] = [round(end, 3) for end in ratio.interval]
    return row


def main() -> None:
    """Measure, print a table; exit 1 if C++ is slower than the session of `load`."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("build", type=Path)
    parser.add_argument("--bundle", type=Path, default=Path("exported/plain"))
    parser.add_argument("--seconds", type=float, default=5.0, help="per row")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    program = arguments.build / "rotary_run"
    rows = [
        measure(program, arguments.bundle, batch_size, fused, arguments.seconds)
        for batch_size in BATCH_SIZES
        for fused in (True, False)
    ]
    print("| " + " | ".join(rows[0]) + " |\n|" + " --- |" * len(rows[0]))
    for row in rows:
        print("| " + " | ".join(str(value) for value in row.values()) + " |")
    if arguments.json:
        machine = describe_machine()
        arguments.json.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n")
    sys.exit(any(row["C++ / session"] > 1 for row in rows))


if __name__ == "__main__":
    main()
