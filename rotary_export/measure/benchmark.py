"""`rotary-export bench`: how long `rotate`, or a model, takes in every runtime that is here."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rotary_export.bundle.manifest import (
    GraphInfo,
    Manifest,
    TensorInfo,
    check_files,
    find_main_graph,
    read_manifest,
)
from rotary_export.errors import RotaryExportError
from rotary_export.measure.machine import describe_machine
from rotary_export.measure.timing import (
    SECONDS,
    Spread,
    describe_noise,
    divide,
    measure_noise,
    time_interleaved,
)
from rotary_export.proof.model import fit_sizes, make_model_inputs
from rotary_export.runtime.load import open_session
from rotary_export.runtime.providers import CPU
from rotary_export.runtime.session import Session, make_bfloat16

SHAPES = ((1, 1), (16, 1), (1, 128), (1, 2048))  # batch_size, seq_len
PAUSE = 5e-3  # ONNX Runtime's threads spin on after a run, on the cores that torch wants next
HEADS = 8  # where the bundle leaves the number open
# Name: format, arguments of open_session.
RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "fused": (
        "onnx",
        {"runtime": "onnxruntime", "providers": [CPU], "use_op_library": True},
    ),
    "portable": (
        "onnx",
        {"runtime": "onnxruntime", "providers": [CPU], "use_op_library": False},
    ),
    "TorchScript": ("torchscript", {"runtime": "torchscript"}),
    "torch.export": ("program", {"runtime": "program"}),
    "AOTInductor": ("aoti", {"runtime": "aoti"}),
}

Arrays = dict[str, np.ndarray[Any, Any]]
Progress = Callable[[str], None]


@dataclass(frozen=True)
class Row:
    """One runtime at one shape.

    Attributes:
        batch_size: B.
        seq_len: S.
        run: Key of RUNS.
        kernel_path: As `Session.kernel_path`.
        seconds: Of a call of the session, allocation of its outputs included.
        speed: How many times faster than the portable graph, else than the first run that is here.
    """

    batch_size: int
    seq_len: int
    run: str
    kernel_path: str
    seconds: Spread
    speed: Spread

    def to_dict(self) -> dict[str, Any]:
        """Return the row as JSON takes it."""
        facts = {name: getattr(self, name) for name in ("batch_size", "seq_len", "run")}
        return facts | {
            "kernel_path": self.kernel_path,
            "seconds": self.seconds.to_dict(),
            "speed": self.speed.to_dict(),
        }


@dataclass(frozen=True)
class Report:
    """What `bench_bundle` found.

    Attributes:
        bundle: Its name.
        dtype: Of query and key.
        machine: As `describe_machine`.
        noise: As `measure_noise`.
        baseline: The run that `Row.speed` compares with.
        rows: One per shape and run.
        skipped: Runs that are not here, and why.
    """

    bundle: str
    dtype: str
    machine: dict[str, object]
    noise: float
    baseline: str
    rows: list[Row]
    skipped: dict[str, str]

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON takes it."""
        return {
            "bundle": self.bundle,
            "dtype": self.dtype,
            "machine": self.machine,
            "noise": round(self.noise, 4),
            "warning": describe_noise(self.noise),
            "baseline": self.baseline,
            "rows": [row.to_dict() for row in self.rows],
            "skipped": self.skipped,
        }

    def tabulate(self) -> tuple[list[str], list[list[object]]]:
        """Return headers and cells for a person, in microseconds."""
        headers = ["batch_size", "seq_len", "run", "kernel", "min us", "median us", "max us"]
        cells = []
        for row in self.rows:
            times = [f"{1e6 * value:.1f}" for value in row.seconds.to_dict().values()]
            names = [row.batch_size, row.seq_len, row.run, row.kernel_path]
            cells.append([*names, *times, f"{row.speed.median:.2f}"])
        return [*headers, f"times as fast as {self.baseline}"], cells


def bench_bundle(
    path: Path,
    shapes: Sequence[tuple[int, int]] = SHAPES,
    seconds: float = SECONDS,
    progress: Progress = lambda what: None,
) -> Report:
    """Time the `rotate` or `model` graph of a bundle on the CPU.

    Args:
        path: The bundle's folder.
        shapes: (batch_size, seq_len) to try; a seq_len over the bundle's max_seq_len is lowered to
            it. A static bundle has but one shape.
        seconds: About how long to measure one shape, and the noise.
        progress: Called with what is being done.

    Returns:
        The report.

    Raises:
        RotaryExportError: The bundle is damaged, has neither, or nothing here can run it.
    """
    manifest = read_manifest(path)
    check_files(path, manifest, list(manifest.files))
    name = find_main_graph(path, manifest)
    graph = manifest.graphs[name]
    sessions: dict[str, Session] = {}
    skipped = {}
    for run, (file_format, options) in RUNS.items():
        if file_format not in graph.files:
            continue
        progress(f"load {run}")
        try:
            sessions[run] = open_session(path, manifest, name, **options)
        except RotaryExportError as error:
            skipped[run] = str(error)
    if not sessions:
        raise RotaryExportError(f"nothing here can run {path}: {'; '.join(skipped.values())}")
    baseline = "portable" if "portable" in sessions else next(iter(sessions))

    rows: list[Row] = []
    noise = 0.0
    for batch_size, seq_len in fit_shapes(manifest, name, shapes):
        inputs = make_inputs(manifest, name, batch_size, seq_len)
        progress(f"time batch_size={batch_size}, seq_len={seq_len}")
        calls = {name: _bind(session, inputs) for name, session in sessions.items()}
        if not rows:
            noise = measure_noise(calls[baseline], seconds, PAUSE)
        times = time_interleaved(calls, seconds, PAUSE)
        for run, spread in times.items():
            speed = divide(times[baseline], spread)
            path_name = sessions[run].kernel_path
            rows.append(Row(batch_size, seq_len, run, path_name, spread, speed))
    return Report(manifest.name, manifest.dtype, describe_machine(), noise, baseline, rows, skipped)


def _bind(session: Session, inputs: Mapping[str, Any]) -> Callable[[], object]:
    return lambda: session(**inputs)


def fit_shapes(
    manifest: Manifest, name: str, shapes: Sequence[tuple[int, int]]
) -> list[tuple[int, int]]:
    """Lower (batch_size, seq_len) to what `rotate` or `model` takes, each once."""
    if name != "rotate":
        return fit_sizes(manifest, shapes)
    query, _, position = manifest.graphs[name].inputs
    if isinstance(query.shape[0], int) and isinstance(query.shape[2], int):
        return [(query.shape[0], query.shape[2])]
    assert position.limits is not None
    rows = position.limits[1] + 1
    return list(dict.fromkeys((batch_size, min(seq_len, rows)) for batch_size, seq_len in shapes))


def make_inputs(manifest: Manifest, name: str, batch_size: int, seq_len: int) -> Mapping[str, Any]:
    """Make inputs of `rotate` (numpy) or `model` (torch) at a shape that it takes."""
    if name == "rotate":
        return _make_rotate_inputs(manifest.graphs[name], batch_size, seq_len)
    return make_model_inputs(manifest, batch_size, seq_len)


def _make_rotate_inputs(graph: GraphInfo, batch_size: int, seq_len: int) -> Arrays:
    """Make normal activations, and ids that count up as in a prompt."""
    rng = np.random.default_rng(0)
    sizes = {"batch_size": batch_size, "seq_len": seq_len}

    def make(info: TensorInfo) -> np.ndarray[Any, Any]:
        shape = [sizes.get(d, HEADS) if isinstance(d, str) else d for d in info.shape]
        if info.name == "seq_len":
            return np.array(seq_len)
        if info.limits is not None:
            return np.broadcast_to(np.arange(seq_len), shape).copy()
        dtype = make_bfloat16() if info.dtype == "bfloat16" else np.dtype(info.dtype)
        return rng.standard_normal(shape, dtype=np.float32).astype(dtype)

    return {info.name: make(info) for info in graph.inputs}
