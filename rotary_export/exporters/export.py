"""`export`: a folder with every graph in every format, proven before it appears."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from rotary_export.bundle.folder import find_out, write_bundle
from rotary_export.bundle.manifest import (
    DEFAULT_FORMATS,
    FILE_NAME,
    SUFFIXES,
    GraphInfo,
    Manifest,
    hash_file,
)
from rotary_export.compat.foreign_rope import PACKAGES, is_foreign_rope
from rotary_export.errors import RotaryExportError
from rotary_export.exporters.aoti import check_compiler, compile_program
from rotary_export.exporters.onnx import export_onnx, minimum_onnxruntime
from rotary_export.exporters.program import export_program
from rotary_export.exporters.torchscript import export_torchscript
from rotary_export.graphs.config import check_config
from rotary_export.graphs.foreign import convert_foreign_rope
from rotary_export.graphs.graph import TRACED_SIZES, Graph, make_graphs
from rotary_export.graphs.kinds import RopeModule
from rotary_export.op.onnx_signature import check_opset
from rotary_export.package import __version__, find_versions
from rotary_export.proof.plain import compare_plain
from rotary_export.proof.report import Report, check_report
from rotary_export.runtime.compiled import COMPILED_FOR
from rotary_export.types import Progress, ignore_progress


@dataclass(frozen=True)
class Bundle:
    """A bundle that was exported.

    Attributes:
        path: Its folder; a Bundle is accepted wherever a path is.
        manifest: What is in it.
        report: The proof.
    """

    path: Path
    manifest: Manifest
    report: Report

    def __fspath__(self) -> str:
        return str(self.path)


def export(
    module: RopeModule | nn.Module,
    out: str | os.PathLike[str],
    *,
    num_heads: int | None = None,
    num_kv_heads: int | None = None,
    head_dim: int | None = None,
    interleaved: bool | None = None,
    max_seq_len: int | None = None,
    batch_size: int | None = None,
    static: bool = False,
    formats: Sequence[str] = DEFAULT_FORMATS,
    opset: int = 23,
    dtype: torch.dtype = torch.float32,
    force: bool = False,
    progress: Progress = ignore_progress,
) -> Bundle:
    """Export a rotary embedding as a bundle of two graphs, and prove it equal to eager.

    `tables`: seq_len -> freqs, scale; of a `ScaledRotaryEmbedding` cos_cache, sin_cache.
    `rotate`: query, key, position_ids -> query_out, key_out, with dynamic batch and sequence; with
    `static`: query, key, seq_len.

    Args:
        module: The embedding, with the buffers that it has now. They must be what the formula of
            its arguments, or of its rope type, gives. A `RotaryEmbedding` of zeta or
            x-transformers is exported as ours of its state dict.
        out: The folder to write; it must not exist, or be a bundle and `force` be given.
        num_heads: Heads of query; None: a dynamic axis.
        num_kv_heads: Heads of key; default: as num_heads.
        head_dim: H, >= module.dim; default: module.dim, or the config's. Channels past module.dim
            are copied.
        interleaved: True: pairs (2i, 2i + 1); False: pairs (i, i + dim/2). None: False, or the
            layout of the module of zeta or x-transformers.
        max_seq_len: Rows of the tables; default: module.max_seq_len, or that of the config.
        batch_size: Of a static export.
        static: query and key have max_seq_len rows, of which the first seq_len are rotated.
        formats: Of "onnx", "torchscript", "program", and "aoti": the program, compiled for the
            CPU by AOTInductor, which requires a C++ compiler.
        opset: Of ai.onnx; from 23 on the function body is ORT's own rotary kernel.
        dtype: Of query and key; float32, float16, bfloat16 or float64. Tables stay float32.
        force: Replace an existing bundle.
        progress: Called with what is being done.

    Returns:
        The bundle, with its manifest and proof.

    Raises:
        RotaryExportError: An argument is wrong or `out` already exists. Nothing is left behind, and
            an existing bundle is as it was; so too for:
        CheckFailedError: The proof failed.
    """
    producers = {"rotary_export": __version__} | find_versions(("torch", "onnx", "onnxscript"))
    if is_foreign_rope(module):
        package = PACKAGES[type(module).__module__.partition(".")[0]]
        producers |= find_versions((package,))
        module, interleaved = convert_foreign_rope(module, interleaved)
    config = check_config(
        module,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        interleaved=False if interleaved is None else interleaved,
        max_seq_len=max_seq_len,
        batch_size=batch_size,
        static=static,
        dtype=dtype,
    )
    check_opset(opset)
    check_formats(formats)
    path = find_out(out)

    with write_bundle(path, force) as staging:
        graphs = {}
        buffers = config.rope.collect_buffers(module, config.max_seq_len)
        state = {name: buffer.cpu() for name, buffer in buffers.items()}
        for graph in make_graphs(config, state):
            graphs[graph.name] = _write_graph(graph, staging, formats, opset, progress)
        manifest = Manifest(
            name=path.name,
            config=config.to_dict(),
            dtype=config.dtype,
            opset=opset,
            graphs=graphs,
            minimum_onnxruntime=minimum_onnxruntime(opset),
            producers=producers,
            files={file.name: hash_file(file) for file in sorted(staging.iterdir())},
            compiled_for=COMPILED_FOR if "aoti" in formats else {},
        )
        report = compare_plain(
            staging,
            manifest,
            lambda step: progress(f"verify {step}"),
            state,
            allow_code=True,  # it was written here
        )
        return finish_bundle(staging, path, manifest, report)


def check_formats(formats: Sequence[str]) -> None:
    """Refuse what is not a list of formats."""
    known = ", ".join(SUFFIXES)
    if isinstance(formats, str) or not isinstance(formats, Sequence):
        raise RotaryExportError(f"formats must be a list, of {known}, got {formats!r}")
    for kind in formats:
        if kind not in SUFFIXES:
            raise RotaryExportError(f"formats must be of {known}, got {kind!r}")
    if not formats:
        raise RotaryExportError("formats must name at least one format, got none")
    if "aoti" in formats:
        if "program" not in formats:
            raise RotaryExportError(
                "the format 'aoti' is compiled from 'program', which formats must name too, got "
                f"{', '.join(formats)}"
            )
        check_compiler()


def _write_graph(
    graph: Graph, folder: Path, formats: Sequence[str], opset: int, progress: Progress
) -> GraphInfo:
    """Write one graph in every format."""
    example = graph.make_inputs(TRACED_SIZES, seq_len=2)
    files = {kind: f"{graph.name}{SUFFIXES[kind]}" for kind in formats}
    rotary_nodes, function_body = int(graph.name == "rotate"), "primitive"
    for kind, file in files.items():
        if kind == "aoti":
            continue  # compiled once the program exists
        progress(f"export {file}")
        if kind == "onnx":
            signatures = export_onnx(graph, example, folder / file, opset)
            if signatures and all(signature.is_native for signature in signatures):
                function_body = "native"
        elif kind == "torchscript":
            export_torchscript(graph, example, folder / file)
        elif kind == "program":
            export_program(graph, example, folder / file)
    if "aoti" in files:
        progress(f"compile {files['aoti']}")
        compile_program(folder / files["program"], example, folder / files["aoti"])
    return GraphInfo(graph.inputs, graph.outputs, files, rotary_nodes, function_body)


def finish_bundle(staging: Path, path: Path, manifest: Manifest, report: Report) -> Bundle:
    """Write the manifest, proof included, into the folder of `write_bundle`.

    Raises:
        CheckFailedError: The proof failed.
    """
    check_report(report)
    manifest = replace(manifest, parity=report.to_dict())
    (staging / FILE_NAME).write_text(manifest.to_json(), encoding="utf-8")
    return Bundle(path, manifest, report)
