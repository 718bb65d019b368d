"""`export_model`: a whole model as a bundle, its rotary embeddings fused and the rest proven."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rotary_export.bundle.manifest import DEFAULT_FORMATS, GraphInfo, Manifest, hash_file
from rotary_export.errors import CheckFailedError, RotaryExportError
from rotary_export.exporters.export import (
    Bundle,
    check_formats,
    find_out,
    finish_bundle,
    write_bundle,
)
from rotary_export.exporters.onnx import check_opset, minimum_onnxruntime
from rotary_export.graphs.config import DTYPES
from rotary_export.models.analyze import Analysis, analyze_model, check_found
from rotary_export.models.arguments import check_arguments
from rotary_export.models.convert import convert_model
from rotary_export.models.error_text import describe_error
from rotary_export.models.find.replace import replace_calls
from rotary_export.models.trace.size_limits import SizeConstraints
from rotary_export.models.trace.snapshot import Snapshot, take_snapshot
from rotary_export.models.write_graph import write_graph
from rotary_export.models.write_onnx import MAX_INLINE_BYTES
from rotary_export.package import __version__, find_versions
from rotary_export.proof.models.cases import Case
from rotary_export.proof.models.compare import (
    GRAPH,
    Results,
    compare_model,
    run_eager,
    write_input_values,
)
from rotary_export.proof.models.frequencies import compare_frequencies
from rotary_export.proof.models.noise import Noise, measure_noise
from rotary_export.proof.report import Report, check_report
from rotary_export.runtime.compiled import COMPILED_FOR
from rotary_export.types import Progress, ignore_progress, name_dtype


def export_model(
    model: nn.Module,
    example_inputs: Mapping[str, Any],
    out: str | os.PathLike[str],
    *,
    dynamic_shapes: str | Mapping[str, Any] | None = "auto",
    opset: int = 23,
    dtype: torch.dtype | None = None,
    formats: Sequence[str] = DEFAULT_FORMATS,
    force: bool = False,
    max_inline_bytes: int = MAX_INLINE_BYTES,
    progress: Progress = ignore_progress,
) -> Bundle:
    """Export a model as a bundle of one graph, `model`, with its rotary embeddings fused.

    The functions by which the model applies a rotary embedding are found by calling them. The op
    replaces them while the model is traced; then the model is restored.

    Args:
        model: Any module whose forward accepts keyword arguments.
        example_inputs: By argument name: tensors, nested ones, a filled key/value cache of
            transformers, constants. Their values and sizes are examples only.
        out: The folder to write; it must not exist, or be a bundle and `force` be given.
        dynamic_shapes: The sizes that stay dynamic. "auto": batch and sequence of each input,
            found by name, type and rank; None: none; or by input name, {axis: name}.
        opset: Of ai.onnx; from 23 on the function body is ORT's own rotary kernel.
        dtype: Export a copy of the model in this type; default: the model as it is.
        formats: As of `export`.
        force: Replace an existing bundle.
        max_inline_bytes: Weights of more bytes than that are written to a file of their own,
            beside the ONNX file.
        progress: Called with the current step.

    Returns:
        The bundle, with its manifest and proof.

    Raises:
        RotaryExportError: An argument is wrong, the model can't be traced with dynamic sizes, or
            `out` already exists. Nothing is written, and an existing bundle is unchanged; so too
            for:
        CheckFailedError: The model applies no rotary embedding that the op computes, or the proof
            failed.
    """
    check_opset(opset)
    check_formats(formats)
    check_arguments(model, example_inputs)
    if dtype is not None and dtype not in DTYPES.values():
        raise RotaryExportError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype}")
    path = find_out(out)
    with write_bundle(path, force) as staging:
        if dtype is not None:
            model, example_inputs = convert_model(model, example_inputs, dtype)
        with take_snapshot(model) as snapshot:
            analysis = analyze_model(model, example_inputs, dynamic_shapes, snapshot, progress)
            check_found(model, analysis.found)
            graph, constraints = write_graph(
                analysis, snapshot, staging, formats, opset, max_inline_bytes, progress
            )

            def make_manifest(noise: Sequence[Noise]) -> Manifest:
                limited = replace(graph, max_size=dict(constraints.max_size))
                config = _make_config(analysis, constraints, noise)
                return _make_manifest(path.name, model, config, limited, opset, staging)

            manifest, report = _prove(
                analysis, constraints, snapshot, staging, make_manifest, progress
            )
            report.add(*compare_frequencies(model))
        return finish_bundle(staging, path, manifest, report)


def _prove(
    analysis: Analysis,
    constraints: SizeConstraints,
    snapshot: Snapshot,
    staging: Path,
    make_manifest: Callable[[Sequence[Noise]], Manifest],
    progress: Progress,
) -> tuple[Manifest, Report]:
    """Compare the graph with the model; limit its sizes where it differs past a bound.

    Raises:
        CheckFailedError: It differs from the model, and no limit is left to set.
    """
    while True:
        progress("run the model itself")
        cases, eager = _run_eager(analysis, constraints, snapshot)
        progress("measure its rounding noise")
        flat = analysis.flat
        noise = measure_noise(flat.model, flat.run_named, cases, eager, snapshot.restore_state)
        manifest = make_manifest(noise)
        try:
            report = compare_model(
                staging, manifest, cases, eager, noise, lambda step: progress(f"verify {step}")
            )
            check_report(report)
        except CheckFailedError as error:
            if constraints.tighten():  # as when the largest few of many are taken, with ties
                progress("limit the sizes: past them the graph differs from the model")
                continue
            if not constraints.conditions:
                raise
            raise CheckFailedError(
                f"{error}; the model takes another branch where not "
                f"{'; '.join(constraints.conditions)}: give that size a fixed one with "
                "dynamic_shapes, or change the model there"
            ) from error
        return manifest, report


def _run_eager(
    analysis: Analysis, constraints: SizeConstraints, snapshot: Snapshot
) -> tuple[list[Case], Results]:
    """Make the cases, and run the model itself on them; the op is compared with its functions."""

    def run(tensors: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
        snapshot.restore_state()  # each run as if it were the first
        with torch.no_grad():
            return analysis.flat.run_named(tensors)

    try:
        with replace_calls(analysis.found, check=True):
            cases = analysis.make_cases(constraints, run)
            return cases, run_eager(run, cases)
    except RotaryExportError:
        raise
    except (Exception, SystemExit) as error:  # whatever the model raises
        raise RotaryExportError(
            f"the model fails at sizes other than its example's: {describe_error(error)}; "
            "choose the dynamic sizes with dynamic_shapes"
        ) from error
    finally:
        snapshot.restore_state()


def _make_config(
    analysis: Analysis, constraints: SizeConstraints, noise: Sequence[Noise]
) -> dict[str, Any]:
    """Return what `verify` needs to make the cases again, and what was found."""
    return {
        "model": type(analysis.flat.model).__name__,
        "traced_sizes": analysis.traced_sizes,
        "length_thresholds": analysis.length_thresholds,
        "max_positions": analysis.max_positions,
        "sizes_to_verify": constraints.sizes_to_verify,
        "unverified": constraints.unverified,
        "mismatched": constraints.mismatched,
        "input_values": write_input_values(analysis.input_values),
        "noise": list(noise),
        "rotary": [asdict(finding) for finding in analysis.found.findings],
    }


def _make_manifest(
    name: str,
    model: nn.Module,
    config: Mapping[str, Any],
    graph: GraphInfo,
    opset: int,
    folder: Path,
) -> Manifest:
    own = type(model).__module__.partition(".")[0]  # not installed if it is the user's own module
    producers = find_versions(("torch", "onnx", "onnxscript", own))
    parameter = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    return Manifest(
        name=name,
        config=config,
        dtype=name_dtype(parameter.dtype),
        opset=opset,
        graphs={GRAPH: graph},
        minimum_onnxruntime=minimum_onnxruntime(opset),
        producers={"rotary_export": __version__} | producers,
        files={file.name: hash_file(file) for file in sorted(folder.iterdir())},
        compiled_for=COMPILED_FOR if "aoti" in graph.files else {},
    )
