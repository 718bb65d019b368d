"""Prove a model's bundle: every format and runtime against the model itself, at sizes not traced.

One session is open at a time, so that there are two copies of the weights at most.
"""

from __future__ import annotations

import functools
import gc
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rotary_export.bundle.dims import SEQ
from rotary_export.bundle.manifest import GraphInfo, Manifest
from rotary_export.errors import CheckFailedError, RotaryExportError, first_line
from rotary_export.proof.comparison import compare, to_comparable
from rotary_export.proof.models.cases import (
    LONGEST_CASE,
    Case,
    InputValues,
    Run,
    list_unverified,
    make_cases,
)
from rotary_export.proof.models.noise import Noise
from rotary_export.proof.oracle import compute_ulp
from rotary_export.proof.report import Report, Row
from rotary_export.proof.stored import check_rotary_nodes
from rotary_export.runtime.ways import REFERENCE, Way, list_ways
from rotary_export.types import Array, Progress, ignore_progress

GRAPH = "model"
_MOST_NOISE = 0.05  # of the largest magnitude: past that, a case can't tell an error from rounding
Results = list[dict[str, Array]]  # per case, by output


def read_cases(manifest: Manifest, run: Run) -> list[Case]:
    """Make the cases that a manifest describes.

    Args:
        manifest: Of a model's bundle.
        run: Runs its graph, which fills its cache.

    Raises:
        RotaryExportError: Its config is not that of a model.
    """
    config = manifest.config
    try:
        return make_cases(
            manifest.graphs[GRAPH].inputs,
            read_input_values(manifest),
            config["traced_sizes"],
            config["length_thresholds"],
            config["max_positions"],
            manifest.graphs[GRAPH].max_size,
            config.get("sizes_to_verify", []),
            run,
        )
    except (LookupError, TypeError) as error:
        raise RotaryExportError(f"the manifest's config is damaged: {error!r}") from None


def make_runner(path: Path, manifest: Manifest) -> Run:
    """Return what runs a bundle's first format that exists; it is opened by the first run."""
    info = manifest.graphs[GRAPH]

    @functools.cache
    def open_session() -> Any:
        failure = RotaryExportError("no runtime that is installed can run the bundle")
        for way in list_ways(info, manifest.compiled_for, {}):
            try:
                return way.open(path, manifest, GRAPH)
            except RotaryExportError as error:  # as ONNX Runtime's CPU for bfloat16
                failure = error
        raise failure

    def run(tensors: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
        feeds = {i.name: tensor for i, tensor in zip(info.inputs, tensors, strict=True)}
        return {name: torch.as_tensor(value) for name, value in open_session()(**feeds).items()}

    return run


def read_noise(manifest: Manifest, count: int) -> list[Noise]:
    """Return the noise of the cases of `read_cases`, as the export measured it.

    Raises:
        RotaryExportError: The manifest lacks it.
    """
    try:
        rows = [{str(k): float(v) for k, v in row.items()} for row in manifest.config["noise"]]
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise RotaryExportError(f"the manifest's config is damaged: {error!r}") from None
    if len(rows) != count + 1:  # the first is the example's, which the manifest does not contain
        raise RotaryExportError(
            f"the manifest's config is damaged: noise of {len(rows)} cases, not of {count + 1}"
        )
    return rows[1:]


def read_input_values(manifest: Manifest) -> dict[str, InputValues]:
    """Return where the values of each input come from, as the manifest of a model has it."""
    return {
        row["input"]: InputValues(
            row["role"], tuple(row["limits"]), row["value"], tuple(row["spread"])
        )
        for row in manifest.config["input_values"]
    }


def write_input_values(sources: Mapping[str, InputValues]) -> list[dict[str, Any]]:
    """Return sources as a manifest keeps them."""
    return [{"input": name, **asdict(source)} for name, source in sources.items()]


def compare_model(
    path: Path,
    manifest: Manifest,
    cases: Sequence[Case],
    eager: Results | None,
    noise: Sequence[Noise],
    progress: Progress = ignore_progress,
) -> Report:
    """Run a model's bundle in every way and compare.

    Args:
        path: The bundle's folder.
        manifest: Its manifest.
        cases: What to run it on.
        eager: What the model itself returns; None: compare with the bundle's first format.
        noise: By how much rounding moves the model's outputs, by case.
        progress: Called with what is being run.

    Raises:
        CheckFailedError: A format does not run.
    """
    info = manifest.graphs[GRAPH]
    check_rotary_nodes(path, info)
    report = Report(shapes={GRAPH: [case.name for case in cases]})
    report.unverified = _list_unverified(manifest)
    ways = list(list_ways(info, manifest.compiled_for, report.skipped))
    ways = [way for way in ways if way is not REFERENCE]  # slow: only where others can't run it
    while ways:
        way = ways.pop(0)
        progress(f"{GRAPH}: {way.name}")
        try:
            kernel_path, results = _run_cases(path, manifest, way, cases)
        except RotaryExportError as error:
            unsupported = manifest.dtype == "bfloat16" and "NOT_IMPLEMENTED" in str(error)
            if not unsupported or way is REFERENCE:
                raise CheckFailedError(f"{way.name} fails: {error}") from error
            report.skipped[way.name] = "ONNX Runtime's CPU has no bfloat16 kernel for some operator"
            if REFERENCE.name not in [row.runtime for row in report.rows]:
                ways.insert(0, REFERENCE)
            continue
        gc.collect()  # a session is gone before the next one, cycles of torch.export included
        if eager is None:
            eager = results
        report.unverified |= _list_ill_conditioned(info, cases, eager, noise)
        report.rows += compare_results(info, way.name, kernel_path, cases, results, eager, noise)
    return report


def _list_unverified(manifest: Manifest) -> dict[str, str]:
    """List what a model's proof leaves out, and why."""
    config, sources = manifest.config, read_input_values(manifest)
    lengths = list_unverified(sources, config["traced_sizes"], config["length_thresholds"])
    why = f"more than {LONGEST_CASE} or no size named {SEQ}, and no position_ids to reach it with"
    fixed = [name for name, source in sources.items() if source.role == "fixed"]
    return {
        **{f"lengths > {size}, where its angles change": why for size in lengths},
        **{
            f"sizes where not {text}": "too large to be run"
            for text in config.get("unverified", [])
        },
        **{
            f"sizes where not {text}": "not equal: a limit" for text in config.get("mismatched", [])
        },
        **{f"other values of {name}": "its meaning is not known" for name in fixed},
    }


def _run_cases(
    path: Path, manifest: Manifest, way: Way, cases: Sequence[Case]
) -> tuple[str, Results]:
    """Run every case in one session, which is gone afterwards."""
    session = way.open(path, manifest, GRAPH)
    results = []
    for case in cases:
        feeds = {i.name: t for i, t in zip(session.graph.inputs, case.tensors, strict=True)}
        try:
            results.append({name: to_comparable(v) for name, v in session(**feeds).items()})
        except Exception as error:  # what the runtimes raise
            raise RotaryExportError(f"at {case.name}: {first_line(error)}") from error
    return session.kernel_path, results


def compare_results(
    info: GraphInfo,
    runtime: str,
    kernel_path: str,
    cases: Sequence[Case],
    got: Results,
    want: Results,
    noise: Sequence[Noise],
) -> list[Row]:
    """Compare results, in ulp of the largest magnitude of each output; padding is left out.

    A row contains the case whose error is the largest share of what its noise allows.
    """
    rows = []
    for output in info.outputs:
        name = output.name
        half = output.dtype in ("float16", "bfloat16")
        worst = Row(GRAPH, name, runtime, kernel_path, "model-half" if half else "model", None)
        for case, ours, theirs, noises in zip(cases, got, want, noise, strict=True):
            left, right = case.select(ours[name]), case.select(theirs[name])
            largest = _find_largest(right)
            moved = noises.get(name, 0.0)
            if moved > _MOST_NOISE * largest:
                continue
            dtype = output.dtype if np.issubdtype(right.dtype, np.floating) else "float64"
            unit = compute_ulp(np.asarray(largest), dtype)  # integers are equal or not
            error = compare(left, right, unit)
            row = replace(worst, eager=error, noise=moved / float(unit), case=case.name)
            if not worst.case or row.eager_share >= worst.eager_share:
                worst = row
        if not worst.case:
            raise CheckFailedError(
                f"{GRAPH}.{name} can't be compared: rounding alone moves it by more than "
                f"{_MOST_NOISE:.0%} of its largest magnitude in every case"
            )
        rows.append(worst)
    return rows


def _find_largest(value: Array) -> float:
    """Return the largest finite magnitude; of none, 1."""
    wide = value.astype(np.float64)
    finite = wide[np.isfinite(wide)]
    return float(np.abs(finite).max()) if finite.size else 1.0


def _list_ill_conditioned(
    info: GraphInfo, cases: Sequence[Case], want: Results, noise: Sequence[Noise]
) -> dict[str, str]:
    """List the outputs of the cases in which rounding hides an error, and by how much."""
    found = {}
    for output in info.outputs:
        for case, theirs, noises in zip(cases, want, noise, strict=True):
            moved = noises.get(output.name, 0.0)
            largest = _find_largest(case.select(theirs[output.name]))
            if moved > _MOST_NOISE * largest:
                why = f"rounding alone moves it by {moved:.2g} of {largest:.2g}, its largest value"
                found[f"{output.name} at {case.name}"] = why
    return found


def run_eager(run: Run, cases: Sequence[Case]) -> Results:
    """Run the model itself on every case."""
    return [{n: to_comparable(v).copy() for n, v in run(case.tensors).items()} for case in cases]
