"""Prove a model's bundle: every format and runtime against the model itself, at sizes not traced.

One session is open at a time, so that there are two copies of the weights at most.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rotary_export.bundle.dims import SEQ
from rotary_export.bundle.manifest import GraphInfo, Manifest
from rotary_export.errors import CheckFailedError, RotaryExportError, first_line
from rotary_export.proof.comparison import Error, compare, to_comparable
from rotary_export.proof.model_cases import (
    LONGEST_CASE,
    Case,
    InputValues,
    list_unverified,
    make_cases,
)
from rotary_export.proof.oracle import compute_ulp
from rotary_export.proof.report import Report, Row
from rotary_export.proof.stored import check_rotary_nodes
from rotary_export.runtime.ways import REFERENCE, Way, list_ways
from rotary_export.types import Array, Progress, ignore_progress

GRAPH = "model"
Results = list[dict[str, Array]]  # per case, by output


def read_cases(manifest: Manifest) -> list[Case]:
    """Make the cases that a manifest describes.

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
        )
    except (LookupError, TypeError) as error:
        raise RotaryExportError(f"the manifest's config is damaged: {error!r}") from None


def read_input_values(manifest: Manifest) -> dict[str, InputValues]:
    """Return where the values of each input come from, as the manifest of a model has it."""
    return {
        row["input"]: InputValues(row["role"], tuple(row["limits"]), row["value"])
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
    progress: Progress = ignore_progress,
) -> Report:
    """Run a model's bundle in every way and compare.

    Args:
        path: The bundle's folder.
        manifest: Its manifest.
        cases: What to run it on.
        eager: What the model itself returns; None: compare with the bundle's first format.
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
        report.rows += compare_results(info, way.name, kernel_path, cases, results, eager)
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
) -> list[Row]:
    """Compare results, in ulp of the largest magnitude of each output; padding is left out."""
    rows = []
    for output in info.outputs:
        half = output.dtype in ("float16", "bfloat16")
        row = Row(GRAPH, output.name, runtime, kernel_path, "model-half" if half else "model", None)
        for case, ours, theirs in zip(cases, got, want, strict=True):
            error = _compare(ours[output.name], theirs[output.name], output.dtype, case)
            row.eager = row.eager.merge(error)
        rows.append(row)
    return rows


def _compare(got: Array, want: Array, dtype: str, case: Case) -> Error:
    if case.keep is not None and got.shape == want.shape:
        keep = case.keep.numpy()
        if want.shape[:2] == keep.shape:
            got, want = got[keep], want[keep]
    if not np.issubdtype(want.dtype, np.floating):
        dtype = "float64"  # integers are equal or not
    wide = want.astype(np.float64)
    finite = wide[np.isfinite(wide)]
    largest = np.abs(finite).max() if finite.size else np.ones(())
    return compare(got, want, compute_ulp(np.asarray(largest, np.float64), dtype))


def run_eager(
    run: Callable[[Sequence[torch.Tensor]], dict[str, torch.Tensor]],
    cases: Sequence[Case],
    reset: Callable[[], None],
) -> Results:
    """Run the model itself on every case, each time as if it were the first."""
    results = []
    for case in cases:
        reset()
        with torch.no_grad():
            results.append({n: to_comparable(v).copy() for n, v in run(case.tensors).items()})
    reset()
    return results
