"""Prove a model's bundle: every format and runtime against the model itself, at sizes not traced.

One session is open at a time, so that there are two copies of the weights at most.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rotary_export.bundle.dims import BATCH, SEQ
from rotary_export.bundle.manifest import GraphInfo, Manifest, check_files, read_manifest
from rotary_export.errors import CheckFailedError, RotaryExportError
from rotary_export.proof import parity
from rotary_export.proof.model_cases import (
    LONGEST_CASE,
    Case,
    Source,
    list_unverified,
    make_case,
    make_cases,
)
from rotary_export.proof.oracle import compute_ulp
from rotary_export.proof.parity import Array, Error, Report, Row, compare
from rotary_export.proof.stored import check_rotary_nodes
from rotary_export.runtime.compiled import find_refusal
from rotary_export.runtime.load import open_session
from rotary_export.runtime.providers import CPU, import_onnxruntime, library_refusal
from rotary_export.runtime.ways import open_reference, to_numpy

GRAPH = "model"
Progress = Callable[[str], None]
Results = list[dict[str, Array]]  # per case, by output


def verify(bundle_dir: str | os.PathLike[str], progress: Progress | None = None) -> Report:
    """Compare every graph of a bundle, in every format and runtime present, with eager PyTorch.

    A model is not in its bundle: what its export compared with the model itself is compared here
    with the first format that is there, of `.pt2`, `.pt` and ONNX without the op library.

    Args:
        bundle_dir: The bundle's folder.
        progress: Called with what is being run.

    Returns:
        The report; `report.passed` says whether it is within the tolerances.

    Raises:
        RotaryExportError: The bundle is damaged or can't be loaded.
    """
    path = Path(bundle_dir)
    manifest = read_manifest(path)
    if GRAPH not in manifest.graphs:
        return parity.verify(path, progress)
    check_files(path, manifest)
    cases = read_cases(manifest)
    return compare_model(path, manifest, cases, None, progress)


def read_cases(manifest: Manifest) -> list[Case]:
    """Make the cases that a manifest describes.

    Raises:
        RotaryExportError: Its config is not that of a model.
    """
    config = manifest.config
    try:
        return make_cases(
            manifest.graphs[GRAPH].inputs,
            _read_sources(manifest),
            config["traced_sizes"],
            config["length_thresholds"],
            config["max_positions"],
            manifest.graphs[GRAPH].max_size,
            config.get("sizes_to_verify", []),
        )
    except (LookupError, TypeError) as error:
        raise RotaryExportError(f"the manifest's config is damaged: {error!r}") from None


def _read_sources(manifest: Manifest) -> dict[str, Source]:
    return {
        row["input"]: Source(row["role"], tuple(row["limits"]), row["value"])
        for row in manifest.config["sources"]
    }


def fit_sizes(manifest: Manifest, shapes: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Lower (batch_size, seq_len) to what a model takes, each once."""
    max_size = manifest.graphs[GRAPH].max_size
    rows, length = max_size.get(BATCH, 1 << 30), max_size.get(SEQ, 1 << 30)
    longest = min(length, manifest.config["max_positions"] or length)
    return list(dict.fromkeys((min(batch, rows), min(seq, longest)) for batch, seq in shapes))


def make_model_inputs(manifest: Manifest, batch_size: int, seq_len: int) -> dict[str, torch.Tensor]:
    """Make inputs of one size, by name; the other sizes are those that were traced."""
    infos = manifest.graphs[GRAPH].inputs
    sizes = manifest.config["traced_sizes"] | {BATCH: batch_size, SEQ: seq_len}
    case = make_case(infos, _read_sources(manifest), sizes)
    return {info.name: value for info, value in zip(infos, case.tensors, strict=True)}


def write_sources(sources: Mapping[str, Source]) -> list[dict[str, Any]]:
    """Return sources as a manifest keeps them."""
    return [{"input": name, **asdict(source)} for name, source in sources.items()]


def compare_model(
    path: Path,
    manifest: Manifest,
    cases: Sequence[Case],
    eager: Results | None,
    progress: Progress | None = None,
) -> Report:
    """Run a model's bundle everywhere and compare.

    Args:
        path: The bundle's folder.
        manifest: Its manifest.
        cases: What to run it on.
        eager: What the model itself returns; None: compare with the bundle's first format.
        progress: Called with what is being run.
    """
    info = manifest.graphs[GRAPH]
    check_rotary_nodes(path, info)
    report = Report(shapes={GRAPH: [case.name for case in cases]})
    report.unverified = _list_unverified(manifest)
    say = progress or (lambda _: None)
    for name, options in _list_runs(info, manifest.compiled_for, report.skipped):
        say(f"{GRAPH}: {name}")
        try:
            kernel_path, results = _run_cases(path, manifest, options, cases)
        except RotaryExportError as error:
            if manifest.dtype != "bfloat16" or "NOT_IMPLEMENTED" not in str(error):
                raise CheckFailedError(f"{name} fails: {error}") from error
            report.skipped[name] = "ONNX Runtime's CPU has no bfloat16 kernel for some operator"
            name, kernel_path = "onnx.reference", "reference"
            if any(row.runtime == name for row in report.rows):
                continue
            say(f"{GRAPH}: {name}")
            reference = open_reference(path / info.files["onnx"], info)
            names = [output.name for output in info.outputs]
            results = [dict(zip(names, reference.run(c.tensors), strict=True)) for c in cases]
        gc.collect()  # a session is gone before the next one, cycles of torch.export included
        if eager is None:
            eager = results
        report.rows += compare_results(info, name, kernel_path, cases, results, eager)
    return report


def _list_unverified(manifest: Manifest) -> dict[str, str]:
    """Say what a model's proof leaves out, and why."""
    config, sources = manifest.config, _read_sources(manifest)
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
    path: Path, manifest: Manifest, options: dict[str, Any], cases: Sequence[Case]
) -> tuple[str, Results]:
    """Run every case in one session, which is gone afterwards."""
    session = open_session(path, manifest, GRAPH, **options)
    results = []
    for case in cases:
        feeds = {i.name: t for i, t in zip(session.graph.inputs, case.tensors, strict=True)}
        try:
            results.append({name: to_numpy(v) for name, v in session(**feeds).items()})
        except Exception as error:  # what the runtimes raise
            reason = str(error).strip().partition("\n")[0]
            raise RotaryExportError(f"at {case.name}: {reason}") from error
    return session.kernel_path, results


def _list_runs(
    info: GraphInfo, compiled_for: Mapping[str, str], skipped: dict[str, str]
) -> list[tuple[str, dict[str, Any]]]:
    runs: list[tuple[str, dict[str, Any]]] = []
    if "program" in info.files:
        runs.append(("torch.export", {"runtime": "program"}))
    if "torchscript" in info.files:
        runs.append(("TorchScript", {"runtime": "torchscript"}))
    if "aoti" in info.files:
        refusal = find_refusal(compiled_for)
        if refusal:
            skipped["AOTInductor"] = refusal
        else:
            runs.append(("AOTInductor", {"runtime": "aoti"}))
    if "onnx" not in info.files:
        return runs
    try:
        import_onnxruntime()
    except RotaryExportError as error:
        skipped["ONNX Runtime"] = str(error)
        return runs
    options: dict[str, Any] = {"runtime": "onnxruntime", "providers": [CPU]}
    runs.append(("ONNX Runtime, function body", options | {"use_op_library": False}))
    refusal = library_refusal([CPU], "auto")
    if refusal:
        skipped["ONNX Runtime, op library"] = refusal
    else:
        runs.append(("ONNX Runtime, op library", options | {"use_op_library": True}))
    return runs


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
            results.append({n: to_numpy(v).copy() for n, v in run(case.tensors).items()})
    reset()
    return results
