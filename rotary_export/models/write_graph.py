"""Traces a model once and writes its graph in every format."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from rotary_export.bundle.manifest import SUFFIXES, GraphInfo, TensorInfo
from rotary_export.compat.quiet import quiet_torch
from rotary_export.errors import CheckFailedError, RotaryExportError
from rotary_export.exporters.aoti import compile_program
from rotary_export.exporters.program import save_program
from rotary_export.exporters.torchscript import save_traced
from rotary_export.fusion.result import NothingFusedError
from rotary_export.models.analyze import Analysis, describe_missing
from rotary_export.models.error_text import describe_error
from rotary_export.models.find.replace import replace_calls
from rotary_export.models.find.replacement import Finding
from rotary_export.models.trace.guards import read_conditions
from rotary_export.models.trace.program import (
    get_inputs,
    get_outputs,
    name_shape,
    name_symbols,
    trace_program,
)
from rotary_export.models.trace.row_limits import find_id_limits
from rotary_export.models.trace.size_limits import (
    OtherBranchError,
    SizeConstraints,
    find_size_constraints,
)
from rotary_export.models.trace.snapshot import Snapshot
from rotary_export.models.trace.trace_patches import patch_for_tracing
from rotary_export.models.trace.traced_rotary import TracedRotary
from rotary_export.models.write_onnx import write_onnx
from rotary_export.proof.models.compare import GRAPH
from rotary_export.types import Progress, name_dtype

_MAX_TRACES = 4


@dataclass(frozen=True)
class Written:
    """A model's graph, written in every format.

    Attributes:
        graph: Its inputs, outputs and files.
        constraints: The sizes at which it equals the model.
        traced: Computes its rotary nodes and their tables.
        inline: Rotary embeddings that no function applies, found in the ONNX graph.
    """

    graph: GraphInfo
    constraints: SizeConstraints
    traced: TracedRotary
    inline: list[Finding]


def write_covering(
    analyze: Callable[[Mapping[str, int]], Analysis], write: Callable[[Analysis], Written]
) -> tuple[Analysis, Written]:
    """Write a graph that covers the example: of another branch, if that of the first trace fails.

    Args:
        analyze: Analyses the model, to be traced at such sizes by name; the others are chosen.
        write: As `write_graph`.

    Raises:
        RotaryExportError: As `write_graph`, of the first trace.
    """
    trace_at: dict[str, int] = {}
    analysis = analyze(trace_at)
    first: RotaryExportError | None = None
    for _ in range(_MAX_TRACES):
        try:
            if first is not None:
                analysis = analyze(trace_at)
            return analysis, write(analysis)
        except CheckFailedError:
            raise
        except RotaryExportError as error:
            first = first or error
            other = error.sizes if isinstance(error, OtherBranchError) else {}
            if trace_at.items() >= other.items():
                break
            trace_at |= other
    assert first is not None
    if analysis.found.fused:
        raise first
    raise CheckFailedError(
        f"{describe_missing(analysis.flat.model, analysis.found)}; whether it applies one inline "
        f"is not known, as its graph can't be searched: {first}"
    ) from first


def write_graph(
    analysis: Analysis,
    snapshot: Snapshot,
    folder: Path,
    formats: Sequence[str],
    opset: int,
    max_inline_bytes: int,
    report_progress: Progress,
    name: str = GRAPH,
    is_rotary: bool = True,
) -> Written:
    """Trace a model and write it in every format.

    Args:
        analysis: The model.
        snapshot: Of the model, restored before it is traced.
        folder: Where to write.
        formats: As `export_model`.
        opset: Of ai.onnx.
        max_inline_bytes: As `export_model`.
        report_progress: Called with the current step.
        name: Of the graph.
        is_rotary: Whether there must be a rotary embedding.

    Raises:
        OtherBranchError: It takes another branch than the traced one at too many sizes.
        RotaryExportError: The model can't be traced, a format can't be written, or angles are
            computed in a half type, which ONNX Runtime does not reproduce.
        CheckFailedError: No function applies a rotary embedding, and the ONNX graph has none.
    """
    inline: list[Finding] = []
    files = {kind: f"{name}{SUFFIXES[kind]}" for kind in formats}
    report_progress("trace")
    graph, constraints, program, symbols = _trace(analysis, snapshot, files)
    traced = TracedRotary(program, [info.name for info in analysis.inputs])
    if "onnx" in files and (half := traced.find_half_angles()):
        raise CheckFailedError(
            f"the model computes the angles of its rotary embedding in {half}: that is wrong from "
            "a few hundred positions on, and ONNX Runtime does not reproduce it; pass "
            "float32_tables=True (--float32-tables) to compute them in float32, or leave 'onnx' "
            "out of formats"
        )
    # torch.onnx last: a program can't be written any more where sizes depend on values.
    for kind, file in sorted(files.items(), key=lambda item: item[0] == "onnx"):
        if kind == "aoti":
            continue  # compiled once the program is written
        report_progress(f"export {file}")
        if kind == "onnx":
            fuse_inline = is_rotary and not analysis.found.fused
            try:
                onnx_file = write_onnx(
                    program, graph, symbols, folder / file, opset, max_inline_bytes, fuse_inline
                )
            except NothingFusedError as error:
                raise CheckFailedError(
                    f"{describe_missing(analysis.flat.model, analysis.found)}; nor does its ONNX "
                    f"graph: {error}"
                ) from error
            if fuse_inline:
                graph = replace(graph, rotary_nodes=onnx_file.nodes)
                inline = _list_inline(onnx_file.fused, file)
            signatures = onnx_file.signatures
            if signatures and all(signature.is_native for signature in signatures):
                graph = replace(graph, function_body="native")
        elif kind == "program":
            _write_program(program, folder / file)
        elif kind == "torchscript":
            snapshot.restore_state()  # torch.export leaves its fake tensors
            _write_torchscript(analysis, folder / file)
    if "aoti" in files:
        report_progress(f"compile {files['aoti']}")
        compile_program(
            folder / files["program"], tuple(analysis.traced.tensors), folder / files["aoti"]
        )
    return Written(graph, constraints, traced, inline)


def _list_inline(fused: Mapping[str, str], file: str) -> list[Finding]:
    """Describe what `fuse` replaced in the ONNX file, by how it was written there."""
    place = f"no function; inline, in {file} alone"
    return [Finding(place, count, count, was) for was, count in Counter(fused.values()).items()]


def _trace(
    analysis: Analysis, snapshot: Snapshot, files: dict[str, str]
) -> tuple[GraphInfo, SizeConstraints, Any, dict[str, str]]:
    """Trace a model; return its graph, the sizes it holds for, the program and its symbols."""
    with patch_for_tracing(analysis.flat.model), torch.no_grad():
        results = analysis.flat.run_named(analysis.traced.tensors)
    program = trace_analyzed(analysis, snapshot)
    constraints = find_size_constraints(
        read_conditions(program, get_inputs(program), analysis.inputs),
        analysis.max_run_size,
        analysis.named.min_size,
        analysis.named.max_size,
        analysis.example_sizes,
        analysis.traced_sizes,
    )
    symbols = name_symbols(program, analysis.inputs)
    outputs = tuple(
        TensorInfo(
            name,
            name_dtype(value.dtype),
            name_shape(value.shape, symbols, name),
        )
        for name, value in zip(results, get_outputs(program), strict=True)
    )
    op = torch.ops.rotary_export.rotary_embedding.default
    nodes = sum(node.target == op for node in program.graph.nodes)
    graph = GraphInfo(
        find_id_limits(program, analysis.inputs),
        outputs,
        files,
        nodes,
        max_size=constraints.max_size,
        min_size=analysis.named.min_size,
    )
    return graph, constraints, program, symbols


def trace_analyzed(analysis: Analysis, snapshot: Snapshot) -> Any:
    """Trace a model with its rotary calls replaced.

    Args:
        analysis: The model.
        snapshot: Of the model, restored before: tables that it keeps and lets grow would end at
            the length of an earlier run.

    Raises:
        RotaryExportError: As `trace_program`.
    """
    snapshot.restore_state()
    with patch_for_tracing(analysis.flat.model), replace_calls(analysis.found):
        return trace_program(
            analysis.flat, analysis.traced.tensors, analysis.inputs, analysis.named.min_size
        )


def _write_program(program: Any, path: Path) -> None:
    try:
        save_program(program, path)
    except Exception as error:  # what torch.export raises
        raise RotaryExportError(
            f"torch.export can't write the model: {describe_error(error)}; leave 'program' out of "
            "formats"
        ) from error


def _write_torchscript(analysis: Analysis, path: Path) -> None:
    try:
        with (
            quiet_torch(),
            patch_for_tracing(analysis.flat.model),
            replace_calls(analysis.found),
            torch.no_grad(),
        ):
            save_traced(analysis.flat, analysis.traced.tensors, path)
    except Exception as error:  # what the tracer raises
        raise RotaryExportError(
            f"torch.jit can't trace the model: {describe_error(error)}; leave 'torchscript' out of "
            "formats"
        ) from error
