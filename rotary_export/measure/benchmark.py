"""`rotary-export bench`: how long `rotate`, or a model, takes in every way available."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rotary_export.bundle.manifest import (
    Manifest,
    check_files,
    find_main_graph,
    read_manifest,
)
from rotary_export.errors import RotaryExportError, explain_damage
from rotary_export.measure.machine import describe_machine
from rotary_export.measure.timing import (
    SECONDS,
    Spread,
    describe_noise,
    divide,
    measure_noise,
    time_interleaved,
)
from rotary_export.proof.sample_inputs import fit_shapes, make_inputs
from rotary_export.runtime.session import Session
from rotary_export.runtime.ways import FUNCTION_BODY, REFERENCE, list_ways
from rotary_export.types import Progress, ignore_progress

SHAPES = ((1, 1), (16, 1), (1, 128), (1, 2048))  # batch_size, seq_len
PAUSE = 5e-3  # ONNX Runtime's threads spin on after a run, on the cores that torch uses next


@dataclass(frozen=True)
class Measurement:
    """One runtime at one shape.

    Attributes:
        batch_size: B.
        seq_len: S.
        run: Name of the `Way`.
        kernel_path: As `Session.kernel_path`.
        seconds: Of a call of the session, allocation of its outputs included.
        speed: How many times faster than the function body, else than the first way available.
    """

    batch_size: int
    seq_len: int
    run: str
    kernel_path: str
    seconds: Spread
    speed: Spread

    def to_dict(self) -> dict[str, Any]:
        """Return the row as values that JSON can express."""
        facts = {name: getattr(self, name) for name in ("batch_size", "seq_len", "run")}
        return facts | {
            "kernel_path": self.kernel_path,
            "seconds": self.seconds.to_dict(),
            "speed": self.speed.to_dict(),
        }


@dataclass(frozen=True)
class BenchmarkReport:
    """What `bench_bundle` found.

    Attributes:
        bundle: Its name.
        dtype: Of query and key.
        machine: As `describe_machine`.
        noise: As `measure_noise`.
        baseline: The run that `Measurement.speed` compares with.
        rows: One per shape and run.
        skipped: Ways that are not available, and why.
    """

    bundle: str
    dtype: str
    machine: dict[str, object]
    noise: float
    baseline: str
    rows: list[Measurement]
    skipped: dict[str, str]

    def to_dict(self) -> dict[str, Any]:
        """Return the report as values that JSON can express."""
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
        """Return headers and human-readable cells, in microseconds."""
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
    progress: Progress = ignore_progress,
    *,
    allow_code: bool = False,
) -> BenchmarkReport:
    """Time the `rotate` or `model` graph of a bundle on the CPU.

    Args:
        path: The bundle's folder.
        shapes: (batch_size, seq_len) to try; a seq_len over the bundle's max_seq_len is lowered to
            it. A static bundle has but one shape.
        seconds: About how long to measure one shape, and the noise.
        progress: Called with what is being done.
        allow_code: Open the formats whose code may run here, too: all but ONNX.

    Returns:
        The report.

    Raises:
        RotaryExportError: The bundle is damaged, has neither, or nothing here can run it.
    """
    manifest = read_manifest(path)
    check_files(path, manifest, list(manifest.files))
    return bench_graph(path, manifest, shapes, seconds, progress, allow_code=allow_code)


def bench_graph(
    path: Path,
    manifest: Manifest,
    shapes: Sequence[tuple[int, int]] = SHAPES,
    seconds: float = SECONDS,
    progress: Progress = ignore_progress,
    *,
    allow_code: bool = False,
) -> BenchmarkReport:
    """Time the main graph of a folder whose files were checked.

    Args:
        path: The folder.
        manifest: What is in it.
        shapes: As `bench_bundle`.
        seconds: As `bench_bundle`.
        progress: As `bench_bundle`.
        allow_code: As `bench_bundle`.

    Raises:
        RotaryExportError: Nothing here can run it.
    """
    name = find_main_graph(path, manifest)
    graph = manifest.graphs[name]
    sessions: dict[str, Session] = {}
    skipped: dict[str, str] = {}
    for way in list_ways(graph, manifest.compiled_for, skipped, allow_code=allow_code):
        if way is REFERENCE:
            continue  # slow by design
        progress(f"load {way.name}")
        try:
            sessions[way.name] = way.open(path, manifest, name)
        except RotaryExportError as error:
            skipped[way.name] = str(error)
    if not sessions:
        raise RotaryExportError(f"nothing here can run {path}: {'; '.join(skipped.values())}")
    baseline = FUNCTION_BODY.name if FUNCTION_BODY.name in sessions else next(iter(sessions))

    rows: list[Measurement] = []
    noise = 0.0
    with explain_damage(f"no inputs can be made for {path}"):
        fitted = fit_shapes(manifest, name, shapes)
    for batch_size, seq_len in fitted:
        with explain_damage(f"no inputs can be made for {path}"):
            inputs = make_inputs(manifest, name, batch_size, seq_len)
        progress(f"time batch_size={batch_size}, seq_len={seq_len}")
        calls = {name: _bind(session, inputs) for name, session in sessions.items()}
        if not rows:
            noise = measure_noise(calls[baseline], seconds, PAUSE)
        times = time_interleaved(calls, seconds, PAUSE)
        for run, spread in times.items():
            speed = divide(times[baseline], spread)
            path_name = sessions[run].kernel_path
            rows.append(Measurement(batch_size, seq_len, run, path_name, spread, speed))
    return BenchmarkReport(
        manifest.name, manifest.dtype, describe_machine(), noise, baseline, rows, skipped
    )


def _bind(session: Session, inputs: Mapping[str, Any]) -> Callable[[], object]:
    return lambda: session(**inputs)
