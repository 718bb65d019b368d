"""A fused file as a bundle: the graph, its proof, what its inputs are, and hashes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from onnxscript import ir

from rotary_export.bundle.folder import check_out, find_out, write_bundle
from rotary_export.bundle.manifest import Manifest, hash_file
from rotary_export.errors import CheckFailedError, RotaryExportError
from rotary_export.exporters.export import Bundle, finish_bundle
from rotary_export.exporters.onnx import minimum_onnxruntime
from rotary_export.fusion.check.compare import Check
from rotary_export.fusion.check.feeds import Shape
from rotary_export.fusion.check.runs import ROW_BY_ROW
from rotary_export.fusion.read import read_model
from rotary_export.fusion.result import FuseResult
from rotary_export.models.fused.describe import draw_sizes, make_config
from rotary_export.op import library as op_library
from rotary_export.package import __version__, find_versions
from rotary_export.proof.models.cases import CaseSpec
from rotary_export.proof.models.compare import compare_model, remake_cases
from rotary_export.proof.report import Report, Row
from rotary_export.proof.tolerances import FUSED, judge_fused
from rotary_export.runtime.onnx_file import GRAPH, read_onnx_file
from rotary_export.runtime.ways import OP_LIBRARY
from rotary_export.types import Progress, ignore_progress, name_dtype

FILE = f"{GRAPH}.onnx"


def check_bundle_out(out: str | os.PathLike[str], force: bool, source: Path) -> None:
    """Check that a bundle can be written, before anything is read.

    Raises:
        RotaryExportError: `out` already exists, or contains the file that is read.
    """
    path = find_out(out)
    check_out(path, force)
    _check_sources(path, [source])


def _check_sources(path: Path, sources: list[Path]) -> None:
    for source in sources:
        if source.absolute().resolve().is_relative_to(path.resolve()):
            raise RotaryExportError(f"{source} is read from: the input is never replaced")


def write_fused_bundle(
    result: FuseResult,
    out: str | os.PathLike[str],
    *,
    force: bool = False,
    progress: Progress = ignore_progress,
) -> Bundle:
    """Write what `fuse` returned as a bundle; it appears whole or not at all.

    Its proof is the comparison of the model before and after. Besides, the bundle's own graph runs
    in every way at the cases that `verify` makes again.

    Args:
        result: Of `fuse`, not of a dry run.
        out: The folder to write; it must not exist, or be a bundle and `force` be given.
        force: Replace an existing bundle.
        progress: Called with the current step.

    Returns:
        The bundle, with its manifest and proof.

    Raises:
        RotaryExportError: `out` already exists, contains a file that the model was read from, or
            `result` was not compared.
        CheckFailedError: The bundle runs at no case, or two ways to run it differ.
    """
    result.check_compared()
    path = find_out(out)
    _check_sources(path, list(result.sources))
    with write_bundle(path, force) as staging:
        progress(f"write {FILE}")
        result.write(staging / FILE)
        manifest = _describe(staging, path.name, result)
        report = _describe_check(result.check, manifest)
        manifest = _keep_cases(staging, manifest, progress)
        cases = remake_cases(staging, manifest, allow_code=False)
        verified = compare_model(staging, manifest, cases, progress, allow_code=False)
        failed = verified.find_failure()
        if failed is not None:
            raise CheckFailedError(
                f"the ways to run the fused model differ, nothing was written: {failed.output} by "
                f"{failed.runtime} differs by {failed.eager.max_ulp:.3g} ulp at {failed.case} "
                f"({failed.eager_allowed:g} are allowed)"
            )
        report.unverified |= manifest.config["left_out"]
        return finish_bundle(staging, path, manifest, report)


def _describe(staging: Path, name: str, result: FuseResult) -> Manifest:
    manifest = read_onnx_file(staging / FILE)
    model = read_model(staging / FILE)
    info, made_by = manifest.graphs[GRAPH], result.model.producer_name
    config = make_config(model, info)
    specs = _list_specs(model, info, result.check)
    config["cases"] = [{"name": each.name, "noise": {}, "spec": each.to_dict()} for each in specs]
    config[FUSED] = {
        "calls": dict(result.fused),
        "not_replaced": [each.node for each in result.why if each.candidate],
        "float32_tables": bool(result.half_tables),
        "narrowest": {name: result.narrowest[name] for name in _list_outputs(info, result)},
    }
    return replace(
        manifest,
        name=name,
        config=config,
        dtype=_find_dtype(model) or manifest.dtype,
        minimum_onnxruntime=minimum_onnxruntime(manifest.opset),
        producers={"rotary_export": __version__}
        | find_versions(("onnx", "onnxscript"))
        | ({made_by: result.model.producer_version} if made_by else {}),
        files={file.name: hash_file(file) for file in sorted(staging.iterdir())},
    )


def _list_outputs(info: Any, result: FuseResult) -> Iterator[str]:
    """Yield the outputs that are wider than the arithmetic before them."""
    for output in info.outputs:
        if result.narrowest.get(output.name, output.dtype) != output.dtype:
            yield output.name


def _list_specs(model: ir.Model, info: Any, check: Check) -> list[CaseSpec]:
    """Return a case for each shape that was compared; of one row where no batch runs."""
    shapes: dict[Shape, None] = {}
    for row in check.comparisons:
        one = Shape(1, row.shape.length, row.shape.past)
        shapes[one if row.run_mode == ROW_BY_ROW else row.shape] = None
    specs = [CaseSpec(draw_sizes(model, info, shape), seed) for seed, shape in enumerate(shapes)]
    return list({spec.name: spec for spec in specs}.values())


def _find_dtype(model: ir.Model) -> str | None:
    """Return the type of the first X of a rotary node."""
    for node in model.graph.all_nodes():
        if node.op_type == "RotaryEmbedding" and node.inputs[0] is not None:
            dtype = node.inputs[0].dtype
            return None if dtype is None else name_dtype(dtype.numpy())
    return None


def _describe_check(check: Check, manifest: Manifest) -> Report:
    """Return the comparison before and after as the report of a bundle."""
    info = manifest.graphs[GRAPH]
    report = Report(reference="the model before fuse", notes=list(check.notes))
    for row in check.comparisons:
        shape = row.shape
        at = f"batch_size {shape.batch}, seq_len {shape.length}, past_seq_len {shape.past}"
        dtype = next((o.dtype for o in info.outputs if o.name == row.output), manifest.dtype)
        _, tolerance = judge_fused(manifest.config, row.output, dtype)
        kernel_path = info.function_body
        if row.runtime == OP_LIBRARY.name:
            kernel_path = f"fused ({op_library.instruction_set()})"
        case, error = f"{at}, {row.run_mode}", row.error
        report.rows.append(
            Row(GRAPH, row.output, row.runtime, kernel_path, tolerance, None, error, case=case)
        )
        report.shapes.setdefault(GRAPH, [])
        if at not in report.shapes[GRAPH]:
            report.shapes[GRAPH].append(at)
    for skipped in check.skipped:
        what, _, why = skipped.partition(": ")
        report.unverified[what] = why
    return report


def _keep_cases(staging: Path, manifest: Manifest, progress: Progress) -> Manifest:
    """Leave out the cases that can't be made, as where a cache can't be filled."""
    kept, left_out = [], {}
    for case in manifest.config["cases"]:
        progress(f"make the case {case['name']}")
        try:
            config = {**manifest.config, "cases": [case]}
            remake_cases(staging, replace(manifest, config=config), allow_code=False)
            kept.append(case)
        except RotaryExportError as error:
            left_out[f"verify at {case['name']}"] = str(error)
    if not kept:
        raise CheckFailedError(
            f"verify could make no case of the bundle: {'; '.join(left_out.values())}"
        )
    return replace(manifest, config={**manifest.config, "cases": kept, "left_out": left_out})
