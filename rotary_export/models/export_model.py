"""`export_model`: a whole model as a bundle, its rotary embeddings fused and the rest proven."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rotary_export.bundle.manifest import (
    DEFAULT_FORMATS,
    SUFFIXES,
    GraphInfo,
    Manifest,
    TensorInfo,
    hash_file,
)
from rotary_export.compat.quiet import quiet_torch
from rotary_export.errors import CheckFailedError, RotaryExportError
from rotary_export.exporters.aoti import compile_program
from rotary_export.exporters.export import (
    Bundle,
    check_formats,
    find_out,
    finish_bundle,
    write_bundle,
)
from rotary_export.exporters.onnx import check_opset, minimum_onnxruntime
from rotary_export.exporters.program import save_program
from rotary_export.exporters.torchscript import save_traced
from rotary_export.graphs.config import DTYPES
from rotary_export.models.find.replace import replace_calls
from rotary_export.models.prepare import (
    Prepared,
    check_found,
    check_model,
    convert_model,
    prepare,
)
from rotary_export.models.trace.guards import read_conditions
from rotary_export.models.trace.program import (
    describe,
    get_inputs,
    get_outputs,
    name_shape,
    name_symbols,
    trace_program,
)
from rotary_export.models.trace.size_limits import SizeConstraints, find_size_constraints
from rotary_export.models.trace.snapshot import Snapshot, preserve
from rotary_export.models.trace.trace_patches import patch_for_tracing
from rotary_export.models.write import MAX_INLINE_BYTES, write_onnx
from rotary_export.package import __version__
from rotary_export.proof.model import GRAPH, Results, compare_model, run_eager, write_input_values
from rotary_export.proof.model_cases import Case
from rotary_export.proof.report import check_report
from rotary_export.runtime.compiled import COMPILED_FOR

Progress = Callable[[str], None]


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
    progress: Progress | None = None,
) -> Bundle:
    """Export a model as a bundle of one graph, `model`, with its rotary embeddings fused.

    The functions by which the model applies a rotary embedding are found by calling them, and
    replaced by the op while the model is traced; the model is left as it was.

    Args:
        model: Any module whose forward takes keyword arguments.
        example_inputs: By argument name: tensors, nested ones, a filled key/value cache of
            transformers, constants. Their values and sizes are examples only.
        out: The folder to write; it must not exist, or be a bundle and `force` be given.
        dynamic_shapes: The sizes that stay open. "auto": batch and sequence of each input, found
            by name, type and rank; None: none; or by input name, {axis: name}.
        opset: Of ai.onnx; from 23 on the function body is ORT's own rotary kernel.
        dtype: Export a copy of the model in this type; default: the model as it is.
        formats: As of `export`.
        force: Replace an existing bundle.
        max_inline_bytes: Weights of more bytes than that go to a file of their own, beside the
            ONNX file.
        progress: Called with what is being done.

    Returns:
        The bundle, with its manifest and proof.

    Raises:
        RotaryExportError: An argument is wrong, the model can't be traced with open sizes, or
            `out` is in the way. Nothing is left behind, and an existing bundle is as it was; so
            too for:
        CheckFailedError: The model applies no rotary embedding that the op computes, or the proof
            failed.
    """
    check_opset(opset)
    check_formats(formats)
    check_model(model, example_inputs)
    if dtype is not None and dtype not in DTYPES.values():
        raise RotaryExportError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype}")
    path = find_out(out)
    say = progress or (lambda _: None)
    with write_bundle(path, force) as staging:
        if dtype is not None:
            model, example_inputs = convert_model(model, example_inputs, dtype)
        with preserve(model) as snapshot:
            prepared = prepare(model, example_inputs, dynamic_shapes, snapshot, say)
            check_found(model, prepared.found)
            graph, paths = _write_graph(
                prepared, snapshot, staging, formats, opset, max_inline_bytes, say
            )
            while True:
                graph = replace(graph, max_size=dict(paths.max_size))
                say("run the model itself")
                cases = prepared.make_cases(paths)
                eager = _run_eager(prepared, cases, snapshot)
                manifest = _make_manifest(path.name, model, prepared, graph, paths, opset, staging)
                try:
                    report = compare_model(
                        staging, manifest, cases, eager, lambda what: say(f"verify {what}")
                    )
                    check_report(report)
                    break
                except CheckFailedError as error:
                    if paths.tighten():  # as when the largest few of many are taken, with ties
                        say("limit the sizes, the export is not equal to the model past them")
                        continue
                    if not paths.texts:
                        raise
                    raise CheckFailedError(
                        f"{error}; the model takes another path where not {'; '.join(paths.texts)}"
                        ": give that size a fixed one with dynamic_shapes, or change the model "
                        "there"
                    ) from error
        return finish_bundle(staging, path, manifest, report)


def _run_eager(prepared: Prepared, cases: Sequence[Case], snapshot: Snapshot) -> Results:
    try:
        with replace_calls(prepared.found, check=True):
            return run_eager(prepared.flat.run_named, cases, snapshot.restore_state)
    except RotaryExportError:
        raise
    except (Exception, SystemExit) as error:  # whatever the model raises
        raise RotaryExportError(
            f"the model fails at sizes other than its example's: {describe(error)}; "
            "dynamic_shapes says which sizes stay open"
        ) from error


def _write_graph(
    prepared: Prepared,
    snapshot: Snapshot,
    folder: Path,
    formats: Sequence[str],
    opset: int,
    max_inline_bytes: int,
    say: Progress,
) -> tuple[GraphInfo, SizeConstraints]:
    """Trace the model and write it in every format."""
    files = {kind: f"{GRAPH}{SUFFIXES[kind]}" for kind in formats}
    tensors = prepared.traced.tensors
    with patch_for_tracing(prepared.flat.model), torch.no_grad():
        results = prepared.flat.run_named(tensors)
    say("trace")
    snapshot.restore_state()  # tables that it keeps and lets grow would end at this length
    with patch_for_tracing(prepared.flat.model), replace_calls(prepared.found):
        program = trace_program(prepared.flat, tensors, prepared.inputs)
    paths = find_size_constraints(
        read_conditions(program, get_inputs(program), prepared.inputs), prepared.max_run_size
    )
    symbols = name_symbols(program, prepared.inputs)
    outputs = tuple(
        TensorInfo(
            name,
            str(value.dtype).removeprefix("torch."),
            name_shape(value.shape, symbols, name),
        )
        for name, value in zip(results, get_outputs(program), strict=True)
    )
    op = torch.ops.rotary_export.rotary_embedding.default
    nodes = sum(node.target == op for node in program.graph.nodes)
    graph = GraphInfo(prepared.inputs, outputs, files, nodes, max_size=paths.max_size)
    # torch.onnx last: a program can't be written any more where sizes depend on values.
    for kind, file in sorted(files.items(), key=lambda item: item[0] == "onnx"):
        if kind == "aoti":
            continue  # compiled once the program is there
        say(f"export {file}")
        if kind == "onnx":
            forms = write_onnx(program, graph, symbols, folder / file, opset, max_inline_bytes)
            if all(form.is_native for form in forms):
                graph = replace(graph, function_body="native")
        elif kind == "program":
            _write_program(program, folder / file)
        elif kind == "torchscript":
            snapshot.restore_state()  # torch.export leaves its fake tensors
            _write_torchscript(prepared, folder / file)
    if "aoti" in files:
        say(f"compile {files['aoti']}")
        compile_program(folder / files["program"], tuple(tensors), folder / files["aoti"])
    return graph, paths


def _write_program(program: Any, path: Path) -> None:
    try:
        save_program(program, path)
    except Exception as error:  # what torch.export raises
        raise RotaryExportError(
            f"torch.export can't write the model: {describe(error)}; leave 'program' out of formats"
        ) from error


def _write_torchscript(prepared: Prepared, path: Path) -> None:
    try:
        with (
            quiet_torch(),
            patch_for_tracing(prepared.flat.model),
            replace_calls(prepared.found),
            torch.no_grad(),
        ):
            save_traced(prepared.flat, prepared.traced.tensors, path)
    except Exception as error:  # what the tracer raises
        raise RotaryExportError(
            f"torch.jit can't trace the model: {describe(error)}; leave 'torchscript' out of "
            "formats"
        ) from error


def _make_manifest(
    name: str,
    model: nn.Module,
    prepared: Prepared,
    graph: GraphInfo,
    paths: SizeConstraints,
    opset: int,
    folder: Path,
) -> Manifest:
    producers = {"rotary_export": __version__}
    for package in ("torch", "onnx", "onnxscript", type(model).__module__.partition(".")[0]):
        try:
            producers[package] = version(package)
        except PackageNotFoundError:  # the user's own module
            continue
    parameter = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    return Manifest(
        name=name,
        config={
            "model": type(model).__name__,
            "traced": prepared.sizes,
            "thresholds": prepared.thresholds,
            "longest": prepared.longest,
            "points": paths.points,
            "unverified": paths.unverified,
            "mismatched": paths.mismatched,
            "input_values": write_input_values(prepared.sources),
            "rotary": [asdict(finding) for finding in prepared.found.findings],
        },
        dtype=str(parameter.dtype).removeprefix("torch."),
        opset=opset,
        graphs={GRAPH: graph},
        minimum_onnxruntime=minimum_onnxruntime(opset),
        producers=producers,
        files={file.name: hash_file(file) for file in sorted(folder.iterdir())},
        compiled_for=COMPILED_FOR if "aoti" in graph.files else {},
    )
