"""`export_model`: a whole model as a bundle, its rotary embeddings fused and the rest proven."""

from __future__ import annotations

import os
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rotary_export.bundle.copy_files import copy_tree
from rotary_export.bundle.folder import check_out, find_out, write_bundle
from rotary_export.bundle.manifest import (
    DECODER,
    DEFAULT_FORMATS,
    FILE_NAME,
    Manifest,
)
from rotary_export.errors import RotaryExportError, UsageWarning
from rotary_export.exporters.export import (
    Bundle,
    check_formats,
    finish_bundle,
)
from rotary_export.graphs.config import DTYPES
from rotary_export.models.convert import convert_model
from rotary_export.models.decoder.files import find_model_folder, write_model_files
from rotary_export.models.decoder.generate import encode_prompts
from rotary_export.models.decoder.inputs import prepare_inputs
from rotary_export.models.decoder.options import DecoderOptions
from rotary_export.models.decoder.parts import describe_blocks, split_model
from rotary_export.models.prove.build_graph import build_graph
from rotary_export.models.prove.prove import (
    ProofOptions,
    RejectedError,
    UnknownCaseError,
    add_generated,
)
from rotary_export.models.trace.snapshot import take_snapshot
from rotary_export.models.write_onnx import MAX_INLINE_BYTES
from rotary_export.op.onnx_signature import check_opset
from rotary_export.proof.models.frequencies import compare_frequencies
from rotary_export.proof.report import Report, check_report
from rotary_export.types import Progress, ignore_progress, name_dtype


def export_model(
    model: nn.Module,
    example_inputs: Mapping[str, Any] | None,
    out: str | os.PathLike[str],
    *,
    dynamic_shapes: str | Mapping[str, Any] | None = "auto",
    opset: int = 23,
    dtype: torch.dtype | None = None,
    formats: Sequence[str] = DEFAULT_FORMATS,
    force: bool = False,
    max_inline_bytes: int = MAX_INLINE_BYTES,
    float32_tables: bool = False,
    cache: str | None = None,
    max_cache_len: int | None = None,
    last_logits: bool = False,
    inputs_embeds: bool = False,
    model_folder: str | os.PathLike[str] | None = None,
    prompts: Sequence[str | Sequence[int]] | None = None,
    quick: bool = False,
    seed: int = 0,
    keep_failed: str | os.PathLike[str] | None = None,
    progress: Progress = ignore_progress,
) -> Bundle:
    """Export a model as a bundle with its rotary embeddings fused: of one graph, `model`.

    An encoder-decoder of transformers becomes two, `encoder` and `decoder`, unless `cache` is
    "none".

    The functions by which the model applies a rotary embedding are found by calling them. The op
    replaces them while the model is traced; then the model is restored. If no function does,
    rotary embeddings are looked for in the ONNX graph, as `fuse` does: the other formats then
    contain the model's own operators.

    Args:
        model: Any module whose forward accepts keyword arguments.
        example_inputs: By argument name: tensors, nested ones, a key/value cache of
            transformers, constants. Their values and sizes are examples only. None: they are
            made, for a model of transformers that accepts token ids.
        out: The folder to write; it must not exist, or be a bundle and `force` be given.
        dynamic_shapes: The sizes that stay dynamic. "auto": batch and sequence of each input,
            found by name, type and rank; None: none; or by input name, {axis: name}.
        opset: Of ai.onnx; from 23 on the function body is ORT's own rotary kernel.
        dtype: Export a copy of the model in this type; default: the model as it is.
        formats: As of `export`.
        force: Replace an existing bundle.
        max_inline_bytes: Weights of more bytes than that are written to a file of their own,
            beside the ONNX file.
        float32_tables: Compute positions, angles and tables in float32 where the model computes
            them in a half type. The proof compares with the model changed in the same way.
        cache: The key/value cache of a causal language model: "full", "window", "static" or
            "none". None: as `example_inputs` have it; "full" where they are made, or contain
            `use_cache=True`.
        max_cache_len: How many positions a static cache holds.
        last_logits: Only the logits of the last position are an output.
        inputs_embeds: The graph reads embeddings, (B, S, hidden_size), in place of token ids, as a
            language model does whose prompts contain images or audio. Another graph,
            `embed_tokens`, embeds tokens.
        model_folder: Of a model of transformers: its config, tokenizer and chat template become
            part of the bundle. Without it, the configs of the model do.
        prompts: That the proof of a decoder generates from: texts, for the tokenizer in
            `model_folder`, or token ids. None: random tokens.
        quick: Prove less: no far positions, no long sequences, fewer tokens.
        seed: Of the values of the proof's inputs.
        keep_failed: A folder to write the bundle to if its proof fails; `load` refuses it, unless
            it is called with `allow_failed=True`.
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
    path = find_out(out)
    kept = None if keep_failed is None else find_out(keep_failed)
    if kept is not None:
        check_out(kept, force)
    options = ProofOptions(quick, seed)
    if kept is not None:
        options = replace(options, outcome=f"the rejected bundle is {kept}")
    with write_bundle(path, force) as staging:
        try:
            manifest, report = _build(
                model,
                example_inputs,
                staging,
                path.name,
                dynamic_shapes=dynamic_shapes,
                opset=opset,
                dtype=dtype,
                formats=formats,
                max_inline_bytes=max_inline_bytes,
                float32_tables=float32_tables,
                decoder=DecoderOptions(cache, last_logits, max_cache_len, inputs_embeds),
                model_folder=model_folder,
                prompts=prompts,
                options=options,
                progress=progress,
            )
        except RejectedError as error:
            if kept is not None:
                _keep(staging, kept, error.manifest, force)
            raise
        return finish_bundle(staging, path, manifest, report)


def prove_case(
    model: nn.Module,
    example_inputs: Mapping[str, Any] | None,
    case: str,
    *,
    dynamic_shapes: str | Mapping[str, Any] | None = "auto",
    opset: int = 23,
    dtype: torch.dtype | None = None,
    formats: Sequence[str] = DEFAULT_FORMATS,
    max_inline_bytes: int = MAX_INLINE_BYTES,
    float32_tables: bool = False,
    cache: str | None = None,
    max_cache_len: int | None = None,
    last_logits: bool = False,
    inputs_embeds: bool = False,
    quick: bool = False,
    seed: int = 0,
    progress: Progress = ignore_progress,
) -> Report:
    """Export a model, and compare it for one case of its proof; nothing is kept.

    Args:
        model: As `export_model`, like the arguments that are not named here.
        example_inputs: As `export_model`.
        case: Its name, as the message of a failed export contains it.
        dynamic_shapes: As `export_model`.
        opset: As `export_model`.
        dtype: As `export_model`.
        formats: As `export_model`.
        max_inline_bytes: As `export_model`.
        float32_tables: As `export_model`.
        cache: As `export_model`.
        max_cache_len: As `export_model`.
        last_logits: As `export_model`.
        inputs_embeds: As `export_model`.
        quick: As `export_model`.
        seed: As `export_model`.
        progress: As `export_model`.

    Returns:
        The report of that case.

    Raises:
        RotaryExportError: As `export_model`, or there is no such case.
    """
    with tempfile.TemporaryDirectory() as folder:
        _, report = _build(
            model,
            example_inputs,
            Path(folder),
            "case",
            dynamic_shapes=dynamic_shapes,
            opset=opset,
            dtype=dtype,
            formats=formats,
            max_inline_bytes=max_inline_bytes,
            float32_tables=float32_tables,
            decoder=DecoderOptions(cache, last_logits, max_cache_len, inputs_embeds),
            model_folder=None,
            prompts=None,
            options=ProofOptions(quick, seed, case),
            progress=progress,
        )
        return report


def _build(
    model: nn.Module,
    example_inputs: Mapping[str, Any] | None,
    folder: Path,
    name: str,
    *,
    dynamic_shapes: str | Mapping[str, Any] | None,
    opset: int,
    dtype: torch.dtype | None,
    formats: Sequence[str],
    max_inline_bytes: int,
    float32_tables: bool,
    decoder: DecoderOptions,
    model_folder: str | os.PathLike[str] | None,
    prompts: Sequence[str | Sequence[int]] | None,
    options: ProofOptions,
    progress: Progress,
) -> tuple[Manifest, Report]:
    """Write a model's graph in every format into a folder, and prove it."""
    check_opset(opset)
    check_formats(formats)
    if type(options.seed) is not int or options.seed < 0:
        raise RotaryExportError(f"seed must be an int >= 0, got {options.seed!r}")
    if dtype is not None and dtype not in DTYPES.values():
        raise RotaryExportError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype}")
    files_from = None if model_folder is None else find_model_folder(model_folder)
    rows = encode_prompts(prompts, files_from)
    inputs = prepare_inputs(model, example_inputs, decoder)
    if dtype is not None:
        model, inputs = convert_model(model, inputs, dtype)
    formula = Report()
    formula.add(*compare_frequencies(model))
    check_report(formula)
    dtype_name = _find_dtype(model)
    left_out_files = write_model_files(model, files_from, folder, dtype_name)
    manifest: Manifest | None = None
    report, notes, unknown = Report(), list[str](), list[UnknownCaseError]()
    parts = split_model(model, inputs, decoder)
    if len(parts) > 1 and dynamic_shapes != "auto":
        raise RotaryExportError(
            f"dynamic_shapes must be 'auto' where a model becomes several graphs, "
            f"{', '.join(part.name for part in parts)}, got {dynamic_shapes!r}"
        )
    if rows is not None and parts[0].name == DECODER:
        raise RotaryExportError("prompts are for a decoder alone: those of an encoder are made")
    for part in parts:
        try:
            proven, found, limits = build_graph(
                part,
                folder,
                name,
                dtype_name,
                dynamic_shapes=dynamic_shapes,
                opset=opset,
                formats=formats,
                max_inline_bytes=max_inline_bytes,
                float32_tables=float32_tables,
                decoder=decoder,
                options=options,
                progress=progress,
            )
        except UnknownCaseError as error:  # it may be one of another graph
            unknown.append(error)
            continue
        except RejectedError as error:
            if manifest is not None:  # of the graphs before it
                parity = error.manifest.parity
                error.manifest = replace(manifest.join(error.manifest), parity=parity)
            raise
        manifest = proven if manifest is None else manifest.join(proven)
        report.join(found)
        notes += limits
    if manifest is None:
        raise unknown[0]
    report.add(formula.rows, formula.unverified)
    if options.case is None:
        with take_snapshot(model) as snapshot:
            add_generated(model, folder, manifest, rows, snapshot, report, options, progress)
    notes += describe_blocks(model, decoder)
    for note in [*notes, *_describe_cache(manifest), *left_out_files]:
        report.notes.append(note)
        warnings.warn(note, UsageWarning, stacklevel=2)
    return manifest, report


def _describe_cache(manifest: Manifest) -> list[str]:
    """Describe a cache whose keys have other angles than a longer sequence has."""
    lengths = manifest.config.get("decoder", {}).get("length_thresholds")
    if not lengths:
        return []
    return [
        f"longrope changes the angles of all positions past {lengths[0]} tokens, but keys in a "
        "cache keep theirs: the model's own generate makes its cache anew there, and a loop over "
        "this graph must do so, too"
    ]


def _keep(staging: Path, path: Path, manifest: Manifest, force: bool) -> None:
    """Write a rejected bundle to a folder of its own."""
    with write_bundle(path, force) as folder:
        copy_tree(staging, folder)
        (folder / FILE_NAME).write_text(manifest.to_json(), encoding="utf-8")


def _find_dtype(model: nn.Module) -> str:
    """Return the type of the first floating-point parameter."""
    parameter = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    return name_dtype(parameter.dtype)
