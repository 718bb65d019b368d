"""`verify_model`: compare a bundle with its model again."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rotary_export.bundle.manifest import (
    EMBED,
    Manifest,
    check_files,
    check_openable,
    read_manifest,
)
from rotary_export.errors import RotaryExportError
from rotary_export.models.analyze import analyze_model
from rotary_export.models.arguments import (
    FlatModel,
    find_extra_arguments,
    read_arguments,
)
from rotary_export.models.convert import convert_model
from rotary_export.models.decoder.generate import compare_generated
from rotary_export.models.decoder.inputs import prepare_inputs
from rotary_export.models.decoder.options import NONE, DecoderOptions
from rotary_export.models.decoder.parts import Part, split_model
from rotary_export.models.error_text import describe_error
from rotary_export.models.prove.prove import (
    QUICK,
    UnknownCaseError,
    add_far_tables,
    choose_cases,
    make_run,
)
from rotary_export.models.trace.snapshot import Snapshot, take_snapshot
from rotary_export.models.trace.traced_rotary import TracedRotary
from rotary_export.models.write_graph import trace_analyzed
from rotary_export.proof.models.cases import EXAMPLE, Case
from rotary_export.proof.models.compare import compare_model, read_sources
from rotary_export.proof.models.frequencies import compare_frequencies
from rotary_export.proof.models.plan import Plan, plan_cases
from rotary_export.proof.models.reference import Reference
from rotary_export.proof.report import FLOAT32_TABLES, Report
from rotary_export.types import Progress, ignore_progress, name_dtype


def verify_model(
    bundle_dir: str | os.PathLike[str],
    model: nn.Module,
    example_inputs: Mapping[str, Any] | None,
    *,
    case: str | None = None,
    seed: int | None = None,
    quick: bool = False,
    allow_code: bool = False,
    progress: Progress = ignore_progress,
) -> Report:
    """Compare every format of a model's bundle with the model, as its export did.

    Args:
        bundle_dir: The bundle's folder; a rejected one is accepted.
        model: What it was exported from.
        example_inputs: As `export_model`, of the same arguments. A cache may be left out.
        case: Name of the one case to run; None: all that a full proof has.
        seed: Of the values of the inputs; None: that of the export.
        quick: As `export_model`.
        allow_code: As `verify`.
        progress: Called with what is being run.

    Returns:
        The report; `report.passed` is whether it is within the tolerances.

    Raises:
        RotaryExportError: The bundle is damaged or is not of such a model, or there is no such
            case.
    """
    path = Path(bundle_dir)
    manifest = read_manifest(path)
    check_files(path, manifest)
    check_openable(path, manifest, allow_code)
    if not manifest.is_model:
        raise RotaryExportError(f"{path} is not the bundle of a model: verify needs no model")
    asked = _read_options(manifest, example_inputs is None)
    inputs: Mapping[str, Any] = prepare_inputs(model, example_inputs, asked)
    model, inputs = _convert(manifest, model, inputs)
    parts = split_model(model, inputs, asked)
    if {part.name for part in parts} != manifest.graphs.keys():
        raise RotaryExportError(
            f"the bundle has the graphs {', '.join(manifest.graphs)}; such a model would have "
            f"{', '.join(part.name for part in parts)}"
        )
    report, unknown = Report(), list[UnknownCaseError]()
    for part in parts:
        graph = manifest.select(part.name)
        plan = _read_plan(graph, seed, quick)
        try:
            report.join(_verify_part(path, graph, part, plan, case, allow_code, progress))
        except UnknownCaseError as error:  # it may be one of another graph
            unknown.append(error)
    if len(unknown) == len(parts):
        raise unknown[0]
    if case is None:
        with take_snapshot(model) as snapshot:
            found, left_out = compare_generated(
                model, path, manifest, None, snapshot, quick, plan.seed, progress
            )
        report.generated += found
        report.unverified |= left_out
    report.add(*compare_frequencies(model))
    report.notes += [FLOAT32_TABLES] if manifest.config.get("float32_tables") else []
    report.notes += [QUICK] if quick else []
    return report


def _verify_part(
    path: Path,
    manifest: Manifest,
    part: Part,
    plan: Plan,
    case: str | None,
    allow_code: bool,
    progress: Progress,
) -> Report:
    """Compare one graph, of a manifest of that graph, with what it was traced from."""
    arguments, tensors = read_arguments(part.inputs)
    _check_inputs(manifest, tensors)
    extra = find_extra_arguments(part.model, part.inputs)
    flat = FlatModel(part.model, arguments, extra, bool(manifest.config.get("float32_tables")))
    example = Case(EXAMPLE, tuple(tensors.values()))
    info = manifest.graphs[part.name]
    with take_snapshot(part.model) as snapshot:
        reference = Reference(
            part.model,
            make_run(flat, snapshot),
            info.inputs,
            plan.sources,
            describe=describe_error,
        )
        cases = choose_cases([example, *plan_cases(plan)], case)
        measured = reference.measure(cases, progress)
        again = reference.measure_again
        report = compare_model(path, manifest, measured, progress, again, allow_code=allow_code)
        if not plan.quick and case is None and "onnx" in info.files:
            _compare_tables(
                manifest, part.model, part.inputs, path, plan, snapshot, report, progress
            )
    report.unverified |= reference.left_out
    return report


def _compare_tables(
    manifest: Manifest,
    model: nn.Module,
    example_inputs: Mapping[str, Any],
    path: Path,
    plan: Plan,
    snapshot: Snapshot,
    report: Report,
    progress: Progress,
) -> None:
    """Trace the model again, and add the tables of the ONNX file at far positions."""
    shapes = {
        info.name: {axis: dim for axis, dim in enumerate(info.shape) if isinstance(dim, str)}
        for info in manifest.graphs[manifest.only_graph].inputs
    }
    try:
        analysis = analyze_model(
            model,
            example_inputs,
            {name: dims for name, dims in shapes.items() if dims},
            snapshot,
            progress,
            bool(manifest.config.get("float32_tables")),
            plan.traced,
        )
        progress("trace")
        traced = TracedRotary(trace_analyzed(analysis, snapshot), [*shapes])
    except RotaryExportError as error:
        report.unverified["tables at far positions"] = str(error)
        return
    finally:
        snapshot.restore_state()
    add_far_tables(plan, traced, path, manifest, report, progress)


def _read_plan(manifest: Manifest, seed: int | None, quick: bool) -> Plan:
    config = manifest.config
    try:
        return Plan(
            sources=read_sources(manifest),
            traced=config["traced_sizes"],
            thresholds=config["length_thresholds"],
            longest=config["max_positions"],
            last=config["last_position"],
            max_size=manifest.graphs[manifest.only_graph].max_size,
            min_size=manifest.graphs[manifest.only_graph].min_size,
            sizes_to_verify=config["sizes_to_verify"],
            seed=config["seed"] if seed is None else seed,
            quick=quick,
        )
    except LookupError as error:
        raise RotaryExportError(f"the manifest's config is damaged: {error!r}") from None


def _read_options(manifest: Manifest, makes_inputs: bool) -> DecoderOptions:
    """Return what the export was asked for: example inputs of that kind are compared."""
    config = manifest.config
    decoder = config.get("decoder", {})
    cache = decoder.get("cache", NONE if makes_inputs else None)
    return DecoderOptions(
        cache,
        bool(config.get("last_logits")),
        decoder.get("max_cache_len"),
        EMBED in manifest.graphs,
    )


def _convert(
    manifest: Manifest, model: nn.Module, example_inputs: Mapping[str, Any]
) -> tuple[nn.Module, Mapping[str, Any]]:
    """Convert a model to the type that it was exported in."""
    floating = next((p for p in model.parameters() if p.is_floating_point()), None)
    if floating is None or name_dtype(floating.dtype) == manifest.dtype:
        return model, example_inputs
    return convert_model(model, example_inputs, getattr(torch, manifest.dtype))


def _check_inputs(manifest: Manifest, tensors: Mapping[str, Tensor]) -> None:
    wanted = [info.name for info in manifest.graphs[manifest.only_graph].inputs]
    if [*tensors] != wanted:
        raise RotaryExportError(
            f"the bundle has the inputs {', '.join(wanted)}; the model's example has "
            f"{', '.join(tensors)}"
        )
