"""One graph of a bundle: written in every format, and proven."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rotary_export.bundle.manifest import GraphInfo, Manifest, hash_file
from rotary_export.exporters.onnx import minimum_onnxruntime
from rotary_export.models.analyze import Analysis, analyze_model, check_found
from rotary_export.models.decoder.describe import describe_decoder
from rotary_export.models.decoder.options import DecoderOptions
from rotary_export.models.decoder.parts import Part
from rotary_export.models.error_text import name_model
from rotary_export.models.prove.limited import describe_limits
from rotary_export.models.prove.prove import ProofOptions, prove
from rotary_export.models.trace.snapshot import take_snapshot
from rotary_export.models.write_graph import Written, write_covering, write_graph
from rotary_export.package import __version__, find_versions
from rotary_export.proof.models.input_values import write_input_values
from rotary_export.proof.models.reference import Measured
from rotary_export.proof.report import Report
from rotary_export.runtime.compiled import COMPILED_FOR
from rotary_export.types import Progress


def build_graph(
    part: Part,
    folder: Path,
    name: str,
    dtype: str,
    *,
    dynamic_shapes: str | Mapping[str, Any] | None,
    opset: int,
    formats: Sequence[str],
    max_inline_bytes: int,
    float32_tables: bool,
    decoder: DecoderOptions,
    options: ProofOptions,
    progress: Progress,
) -> tuple[Manifest, Report, list[str]]:
    """Write one graph in every format into a folder, and prove it.

    Args:
        part: The graph, and what it is traced from.
        folder: Where to write.
        name: Of the bundle.
        dtype: Of the model.
        dynamic_shapes: As `export_model`.
        opset: As `export_model`.
        formats: As `export_model`.
        max_inline_bytes: As `export_model`.
        float32_tables: As `export_model`.
        decoder: The cache and the logits.
        options: How much is proven.
        progress: Called with the current step.

    Returns:
        The manifest of the graph, its report, and its limits in words.

    Raises:
        RejectedError: It is not equal to its model.
        RotaryExportError: As `export_model`.
    """
    with take_snapshot(part.model) as snapshot:

        def analyze(trace_at: Mapping[str, int]) -> Analysis:
            analysis = analyze_model(
                part.model,
                part.inputs,
                dynamic_shapes,
                snapshot,
                progress,
                float32_tables,
                trace_at,
            )
            if part.is_rotary:
                check_found(part.model, analysis.found, formats)
            return analysis

        def write(analysis: Analysis) -> Written:
            return write_graph(
                analysis,
                snapshot,
                folder,
                formats,
                opset,
                max_inline_bytes,
                progress,
                part.name,
                part.is_rotary,
            )

        analysis, written = write_covering(analyze, write)

        def make_manifest(
            limited: GraphInfo, measured: Sequence[Measured], left_out: dict[str, str]
        ) -> Manifest:
            config = _make_config(analysis, written, measured, left_out, options)
            config |= describe_decoder(part.model, limited, decoder)
            return _make_manifest(name, part, config, limited, opset, folder, dtype)

        manifest, report = prove(
            analysis,
            written.graph,
            written.constraints,
            written.traced,
            snapshot,
            folder,
            make_manifest,
            options,
            progress,
        )
        return manifest, report, describe_limits(analysis, written.constraints, snapshot)


def _make_config(
    analysis: Analysis,
    written: Written,
    measured: Sequence[Measured],
    left_out: Mapping[str, str],
    options: ProofOptions,
) -> dict[str, Any]:
    """Return what `verify` needs to make the cases again, and what was found."""
    return {
        "model": name_model(analysis.flat.model),
        "traced_sizes": analysis.traced_sizes,
        "length_thresholds": analysis.length_thresholds,
        "max_positions": analysis.max_positions,
        "last_position": analysis.last,
        "sizes_to_verify": written.constraints.sizes_to_verify,
        "unverified": written.constraints.unverified,
        "mismatched": written.constraints.mismatched,
        "limits": written.constraints.reasons,
        "left_out": dict(left_out),
        "float32_tables": analysis.flat.float32_tables,
        "quick": options.quick,
        "seed": options.seed,
        "input_values": write_input_values(analysis.input_values),
        "cases": [each.to_dict() for each in measured],
        "rotary": [asdict(each) for each in (*analysis.found.findings, *written.inline)],
    }


def _make_manifest(
    name: str,
    part: Part,
    config: Mapping[str, Any],
    graph: GraphInfo,
    opset: int,
    folder: Path,
    dtype: str,
) -> Manifest:
    own = type(part.model).__module__.partition(".")[
        0
    ]  # not installed if it is the user's own module
    producers = find_versions(("torch", "onnx", "onnxscript", own))
    return Manifest(
        name=name,
        config=config,
        dtype=dtype,
        opset=opset,
        graphs={part.name: graph},
        minimum_onnxruntime=minimum_onnxruntime(opset),
        producers={"rotary_export": __version__} | producers,
        files={file.name: hash_file(file) for file in sorted(folder.iterdir())},
        compiled_for=COMPILED_FOR if "aoti" in graph.files else {},
    )
