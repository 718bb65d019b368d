"""A traced model as an ONNX file; large weights are written to a file beside it."""

from __future__ import annotations

import operator
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import onnx
import torch
from onnxscript import ir, optimizer

from rotary_export.bundle.manifest import DATA_SUFFIX, GraphInfo
from rotary_export.compat.onnx_export import skip_needless_work
from rotary_export.errors import RotaryExportError
from rotary_export.exporters.onnx import strip_metadata, translate_op
from rotary_export.exporters.onnx_file import take_weights, write_model
from rotary_export.fusion.fuse import replace_rotations
from rotary_export.fusion.operators.apply import write_operators
from rotary_export.models.error_text import describe_error, explain_onnx_error
from rotary_export.models.trace.adapt.adapt_program import adapt_program
from rotary_export.models.trace.adapt.floor_division import translate_floor_division
from rotary_export.op.onnx_function import add_functions
from rotary_export.op.onnx_graph import count_rotary_nodes
from rotary_export.op.onnx_schema import register_schema
from rotary_export.op.onnx_signature import FunctionSignature

# One file of protobuf ends at 2 GiB; the graph itself needs some of it.
MAX_INLINE_BYTES = 1_800_000_000
_FOLD_LIMIT = 64  # elements of a constant that folding may write into the graph


class OnnxFile(NamedTuple):
    """What a file contains.

    Attributes:
        signatures: Of the functions of its rotary nodes, each once.
        nodes: Number of its rotary nodes.
        fused: What `fuse` replaced: how it was written, by the name of its output.
    """

    signatures: list[FunctionSignature]
    nodes: int
    fused: dict[str, str]


def write_onnx(
    program: Any,
    info: GraphInfo,
    symbols: Mapping[str, str],
    path: Path,
    opset: int,
    max_inline_bytes: int,
    fuse_inline: bool = False,
) -> OnnxFile:
    """Write a traced model as ONNX.

    Args:
        program: As `trace_program` made it.
        info: Names of the inputs and outputs.
        symbols: By torch.export's symbol, the name of a size.
        path: The file to write.
        opset: Of ai.onnx.
        max_inline_bytes: If the weights are larger, they are written to `PATH_data`.
        fuse_inline: Find rotary embeddings in the graph, as `fuse` does.

    Returns:
        What it contains.

    Raises:
        NothingFusedError: With `fuse_inline`: nothing was replaced.
        RotaryExportError: An operator has no translation, or the file is not valid ONNX.
    """
    register_schema()
    try:
        exported = _translate(program, opset)
    except RotaryExportError:
        raise
    except Exception as error:  # what torch's exporter raises
        raise RotaryExportError(
            f"torch.onnx can't write the model: {explain_onnx_error(error)}; "
            f"{_find_way_out(program, opset)}"
        ) from error
    model = exported.model
    with skip_needless_work():
        optimizer.optimize_ir(model, output_size_limit=_FOLD_LIMIT)
    _rename(model, info, symbols)
    strip_metadata(model)
    fused = dict(replace_rotations(model, ()).fused) if fuse_inline else {}
    write_operators(model)
    size = sum(value.const_value.nbytes for value in model.graph.initializers.values())
    is_external = size > max_inline_bytes
    if is_external:
        ir.external_data.unload_from_model(
            model, path.parent, f"{path.name}{DATA_SUFFIX}", size_threshold_bytes=1024
        )
    weights = [] if is_external else take_weights(model)
    proto = ir.serde.serialize_model(model)
    signatures = add_functions(proto)
    write_model(proto, weights, path)
    try:  # without the weights, of which the checker would make more copies
        onnx.checker.check_model(str(path) if is_external else proto, full_check=not is_external)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise RotaryExportError(
            f"torch.onnx wrote a model that is not valid: {describe_error(error)}"
        ) from error
    return OnnxFile(signatures, count_rotary_nodes(proto.graph), fused)


def _translate(program: Any, opset: int) -> Any:
    """Translate a program by torch.onnx."""
    op = torch.ops.rotary_export.rotary_embedding.default
    # Without gradients: the op has none for tables, which learned frequencies require.
    with skip_needless_work(), torch.no_grad():
        return torch.onnx.export(
            adapt_program(program, opset),
            (),
            dynamo=True,
            opset_version=opset,
            custom_translation_table={
                op: translate_op,
                operator.floordiv: translate_floor_division,
            },
            optimize=False,
            verbose=False,
        )


def _find_way_out(program: Any, opset: int) -> str:
    """Return what to do where torch.onnx fails: another opset, if one works."""
    other = 22 if opset > 22 else 23
    # A decomposition may make sizes constants, with which the same opset would do, wrongly.
    if _can_translate(program, other) and not _can_translate(program, opset):
        return f"it can with opset={other} (--opset {other})"
    return "use other operators there, or leave 'onnx' out of formats"


def _can_translate(program: Any, opset: int) -> bool:
    try:
        _translate(program, opset)
    except Exception:  # what torch's exporter raises
        return False
    return True


def _rename(model: ir.Model, info: GraphInfo, symbols: Mapping[str, str]) -> None:
    """Name inputs, outputs and sizes as in the manifest, and weights as in the model."""
    graph = model.graph
    taken = {tensor.name for tensor in (*info.inputs, *info.outputs)}
    for name, value in list(graph.initializers.items()):
        value.name = _avoid(name.removeprefix("model."), taken)
    for node in graph:
        for value in node.outputs:
            if value.name in taken:
                value.name = _avoid(value.name, taken)
    for value, tensor in zip(graph.inputs, info.inputs, strict=True):
        value.name = tensor.name
    for value, tensor in zip(graph.outputs, info.outputs, strict=True):
        value.name = tensor.name
    values = [*graph.inputs, *graph.initializers.values()]
    values += [value for node in graph for value in node.outputs]
    for value in values:
        if value.shape is not None:
            value.shape = ir.Shape([_rename_dim(dim, symbols) for dim in value.shape])
    for value, tensor in zip(graph.outputs, info.outputs, strict=True):
        value.shape = ir.Shape(tensor.shape)


def _avoid(name: str, taken: set[str]) -> str:
    while name in taken:
        name += "_"
    return name


def _rename_dim(dim: Any, symbols: Mapping[str, str]) -> int | str | None:
    if isinstance(dim, int) or dim.value is None:
        return dim if isinstance(dim, int) else None
    return re.sub(r"\b[su]\d+\b", lambda match: symbols.get(match[0], match[0]), str(dim.value))
