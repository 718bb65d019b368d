"""Prove a model's bundle: every format and runtime against the model itself, at sizes not traced.

One session is open at a time, so that there are two copies of the weights at most.
"""

from __future__ import annotations

import functools
import gc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch

from rotary_export.bundle.manifest import GraphInfo, Manifest
from rotary_export.compat.glibc import return_memory
from rotary_export.errors import CheckFailedError, RotaryExportError, first_line
from rotary_export.proof.comparison import compare
from rotary_export.proof.models.cases import Case, CaseSpec, Run, make_case
from rotary_export.proof.models.input_values import InputValues, read_input_values
from rotary_export.proof.models.reference import (
    MOST_NOISE,
    Measured,
    find_ill_conditioned,
    find_largest,
)
from rotary_export.proof.oracle import compute_ulp
from rotary_export.proof.report import Report, Row
from rotary_export.proof.stored import check_rotary_nodes
from rotary_export.proof.tolerances import FUSED, judge_fused
from rotary_export.runtime.ways import REFERENCE, Way, list_ways
from rotary_export.types import Array, Progress

GRAPH = "model"
_LARGE = 2**26  # bytes of a bundle above which two open sessions would be felt
Results = list[dict[str, Array]]  # per case, by output


def read_sources(manifest: Manifest) -> dict[str, InputValues]:
    """Return where the values of each input of a model's bundle come from.

    Raises:
        RotaryExportError: The manifest's config is not that of a model.
    """
    try:
        return read_input_values(manifest.config["input_values"])
    except (LookupError, TypeError) as error:
        raise RotaryExportError(f"the manifest's config is damaged: {error!r}") from None


def read_cases(manifest: Manifest) -> list[tuple[CaseSpec, dict[str, float]]]:
    """Return how the cases of a model's bundle are made, and their noise; without the example.

    Raises:
        RotaryExportError: The manifest's config is not that of a model.
    """
    try:
        return [
            (
                CaseSpec(**row["spec"]),
                {str(name): float(moved) for name, moved in row["noise"].items()},
            )
            for row in manifest.config["cases"]
            if "spec" in row
        ]
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise RotaryExportError(f"the manifest's config is damaged: {error!r}") from None


def remake_cases(path: Path, manifest: Manifest, *, allow_code: bool) -> list[Measured]:
    """Make the cases that a manifest describes; the bundle itself fills a cache.

    Args:
        path: The bundle's folder.
        manifest: Its manifest, of one graph.
        allow_code: Whether files whose code may run are opened, too.

    Raises:
        RotaryExportError: The manifest's config is damaged, or nothing here can run the bundle.
    """
    infos, sources = manifest.graphs[manifest.only_graph].inputs, read_sources(manifest)
    run = _make_runner(path, manifest, allow_code)
    try:
        return [
            Measured(make_case(infos, sources, spec, run), None, noise)
            for spec, noise in read_cases(manifest)
        ]
    except RotaryExportError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise RotaryExportError(f"the manifest's config is damaged: {error!r}") from None


def _make_runner(path: Path, manifest: Manifest, allow_code: bool) -> Run:
    """Return what runs a bundle's first format that exists; it is opened by the first run."""
    graph = manifest.only_graph
    info = manifest.graphs[graph]

    @functools.cache
    def open_session() -> Any:
        failure = RotaryExportError("no runtime that is installed can run the bundle")
        for way in list_ways(info, manifest.compiled_for, {}, allow_code=allow_code):
            try:
                return way.open(path, manifest, graph)
            except RotaryExportError as error:  # as ONNX Runtime's CPU for bfloat16
                failure = error
        raise failure

    def run(tensors: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
        feeds = {i.name: tensor for i, tensor in zip(info.inputs, tensors, strict=True)}
        return {name: torch.as_tensor(value) for name, value in open_session()(**feeds).items()}

    return run


def _has_bfloat16(path: Path, manifest: Manifest) -> bool:
    """Return whether a model is bfloat16, or casts to it, as under autocast."""
    if manifest.dtype == "bfloat16":
        return True
    file = manifest.graphs[manifest.only_graph].files["onnx"]
    model = onnx.load(path / file, load_external_data=False)
    return any(
        attribute.name == "to" and attribute.i == onnx.TensorProto.BFLOAT16
        for node in model.graph.node
        for attribute in node.attribute
    )


def compare_model(
    path: Path,
    manifest: Manifest,
    measured: list[Measured],
    progress: Progress,
    measure_again: Callable[[Measured], Measured] | None = None,
    *,
    allow_code: bool,
) -> Report:
    """Run a graph of a model's bundle in every way and compare.

    Args:
        path: The bundle's folder.
        manifest: Its manifest, of one graph.
        measured: What to run it on, and what the model itself returns; where that is None, the
            bundle's first format takes its place. Receives noise that was measured again.
        progress: Called with what is being run.
        measure_again: Measures the noise of a case by more runs, before an error is final.
        allow_code: Open the files whose code may run, too.

    Raises:
        CheckFailedError: A format does not run.
    """
    graph = manifest.only_graph
    info = manifest.graphs[graph]
    check_rotary_nodes(path, info)
    alone = all(each.eager is None for each in measured)
    fused = manifest.config if FUSED in manifest.config and alone else None
    report = Report(shapes={graph: [each.case.name for each in measured]})
    report.unverified = list_unverified(manifest)
    ways = [*list_ways(info, manifest.compiled_for, report.skipped, allow_code=allow_code)]
    ways = [way for way in ways if way is not REFERENCE]  # slow: only where others can't run it
    while ways:
        way = ways.pop(0)
        progress(f"verify {graph}: {way.name}")
        if _count_bytes(path) > _LARGE:
            gc.collect()  # the last session, too: torch.export's are in cycles
            return_memory()
        try:
            kernel_path, results = _run_cases(path, manifest, way, [m.case for m in measured])
        except RotaryExportError as error:
            unsupported = "NOT_IMPLEMENTED" in str(error) and _has_bfloat16(path, manifest)
            if not unsupported or way is REFERENCE:
                raise CheckFailedError(f"{way.name} fails: {error}") from error
            report.skipped[way.name] = "ONNX Runtime's CPU has no bfloat16 kernel for some operator"
            if REFERENCE.name not in [row.runtime for row in report.rows]:
                ways.insert(0, REFERENCE)
            continue
        measured[:] = [
            each if each.eager is not None else replace(each, eager=ours)
            for each, ours in zip(measured, results, strict=True)
        ]
        rows = compare_results(info, way.name, kernel_path, measured, results, fused, graph)
        while measure_again is not None and (case := _find_failed(rows)):
            progress(f"measure the rounding noise again: {case}")
            measured[:] = [measure_again(m) if m.case.name == case else m for m in measured]
            rows = compare_results(info, way.name, kernel_path, measured, results, fused, graph)
            if any(row.case == case and not row.passed for row in rows):
                measure_again = None  # the verdict is final
        report.unverified |= _list_ill_conditioned(measured)
        report.rows += rows
    return report


def _count_bytes(path: Path) -> int:
    return sum(file.stat().st_size for file in path.iterdir())


def _find_failed(rows: Sequence[Row]) -> str:
    """Return the name of the case with the largest share of its limit; "": all are within."""
    failed = [row for row in rows if not row.passed]
    return max(failed, key=lambda row: row.eager_share).case if failed else ""


def list_unverified(manifest: Manifest) -> dict[str, str]:
    """List what a model's proof leaves out, and why."""
    config, sources = manifest.config, read_sources(manifest)
    rows = [name for name, source in sources.items() if source.role == "rows"]
    return {
        **config.get("left_out", {}),
        **{
            f"sizes other than {text}": "too large to be run"
            for text in config.get("unverified", [])
        },
        **{
            f"sizes other than {text}": "not equal: a limit"
            for text in config.get("mismatched", [])
        },
        **{f"other values of {name}": "its meaning is not known" for name in rows},
    }


def _run_cases(
    path: Path, manifest: Manifest, way: Way, cases: Sequence[Case]
) -> tuple[str, Results]:
    """Run every case in one session, which is gone afterwards."""
    session = way.open(path, manifest, manifest.only_graph)
    results = []
    for case in cases:
        feeds = {i.name: t for i, t in zip(session.graph.inputs, case.tensors, strict=True)}
        try:
            results.append(case.read_outputs(session(**feeds)))
        except Exception as error:  # what the runtimes raise
            raise RotaryExportError(f"at {case.name}: {first_line(error)}") from error
    return session.kernel_path, results


def compare_results(
    info: GraphInfo,
    runtime: str,
    kernel_path: str,
    measured: Sequence[Measured],
    results: Results,
    fused: Mapping[str, Any] | None = None,
    graph: str = GRAPH,
) -> list[Row]:
    """Compare results, in ulp of the largest magnitude of each output; padding is left out.

    A row contains the case whose error is the largest share of what its noise allows. Of a fused
    file no noise is known: it is judged as `fuse` judges.
    """
    rows = []
    for output in info.outputs:
        name = output.name
        half = output.dtype in ("float16", "bfloat16")
        judged_by, tolerance = output.dtype, "model-half" if half else "model"
        if fused is not None:
            judged_by, tolerance = judge_fused(fused, name, output.dtype)
        worst = Row(graph, name, runtime, kernel_path, tolerance, None)
        for each, ours in zip(measured, results, strict=True):
            assert each.eager is not None
            left, right = each.case.select(ours[name]), each.case.select(each.eager[name])
            largest, moved = find_largest(right), each.noise.get(name, 0.0)
            if moved > MOST_NOISE * largest:
                continue
            dtype = judged_by if np.issubdtype(right.dtype, np.floating) else "float64"
            unit = compute_ulp(np.asarray(largest), dtype)  # integers are equal or not
            error = compare(left, right, unit)
            row = replace(worst, eager=error, noise=moved / float(unit), case=each.case.name)
            if not worst.case or row.eager_share >= worst.eager_share:
                worst = replace(row, place=each.case.locate(error.worst, output.shape))
        if not worst.case:
            raise CheckFailedError(
                f"{graph}.{name} can't be compared: rounding alone moves it by more than "
                f"{MOST_NOISE:.0%} of its largest magnitude in every case"
            )
        rows.append(worst)
    return rows


def _list_ill_conditioned(measured: Sequence[Measured]) -> dict[str, str]:
    """List the outputs of the cases in which rounding hides an error, and by how much."""
    return {
        f"{name} at {each.case.name}": why
        for each in measured
        for name, why in find_ill_conditioned(each).items()
    }
