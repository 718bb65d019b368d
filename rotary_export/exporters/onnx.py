"""ONNX: torch's exporter, then the op's body, tidy names and nothing of this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import onnxscript
import torch
from onnxscript import ir, optimizer

from rotary_export.compat.onnx_export import skip_needless_work
from rotary_export.exporters.program import make_dynamic_shapes
from rotary_export.graphs.graph import Graph
from rotary_export.graphs.plain import ZETA
from rotary_export.op import spec
from rotary_export.op.onnx_function import add_functions
from rotary_export.op.onnx_schema import register_schema
from rotary_export.op.onnx_signature import NATIVE_OPSET, FunctionSignature
from rotary_export.package import __version__

# Only scalars are folded into the graph, which computes its tables from inv_freq and zeta.
_FOLD_LIMIT = 1


def translate_op(
    x: Any,
    cos_cache: Any,
    sin_cache: Any,
    position_ids: Any = None,
    key: Any = None,
    scale_cache: Any = None,
    interleaved: bool = False,
    rotary_dim: int = 0,
    num_heads: int = 0,
    kv_num_heads: int = 0,
) -> Any:
    """Translate the torch op to one node; attributes that have their default are left out."""
    values = (interleaved, rotary_dim, num_heads, kv_num_heads)
    attributes = {
        name: int(value) for name, value in zip(spec.ATTRIBUTES, values, strict=True) if value
    }
    inputs = [x, cos_cache, sin_cache, position_ids, key, scale_cache]
    while inputs[-1] is None:
        inputs.pop()
    op = onnxscript.values.Opset(spec.DOMAIN, spec.OP_VERSION)
    return op.RotaryEmbedding(*inputs, **attributes, _outputs=2)


def export_onnx(
    graph: Graph, example: tuple[torch.Tensor, ...], path: Path, opset: int
) -> list[FunctionSignature]:
    """Write one graph as ONNX.

    Args:
        graph: What to export.
        example: Inputs to trace with.
        path: The file to write.
        opset: Of ai.onnx, >= 18.

    Returns:
        The signatures of its rotary nodes, one per function body.
    """
    register_schema()
    with skip_needless_work():
        program: Any = torch.onnx.export(
            graph.module,
            example,
            dynamo=True,
            opset_version=opset,
            input_names=[info.name for info in graph.inputs],
            dynamic_shapes=make_dynamic_shapes(graph),
            custom_translation_table={
                torch.ops.rotary_export.rotary_embedding.default: translate_op
            },
            optimize=False,
            verbose=False,
        )
        model = program.model
        optimizer.optimize_ir(model, output_size_limit=_FOLD_LIMIT)
    _rename(model, graph)
    strip_metadata(model)
    proto = ir.serde.serialize_model(model)
    signatures = add_functions(proto)
    onnx.checker.check_model(proto, full_check=True)
    onnx.save(proto, path)
    return signatures


def _rename(model: ir.Model, graph: Graph) -> None:
    """Name the initialisers after their buffers and the outputs as in every format."""
    for name, value in list(model.graph.initializers.items()):
        if value.is_graph_output():  # xPos is off: the scale is a constant
            value.const_value = None
            del model.graph.initializers[name]
            one = ir.node("Constant", [], {"value_float": 1.0}, outputs=[value])
            model.graph.append(one)
        elif name == "scale":  # a buffer and an output of that name would collide
            value.name = ZETA
        elif name == "select":  # a rope type's only frequencies, inv_freq[0], were folded
            value.name = "inv_freq"
    for value, info in zip(model.graph.outputs, graph.outputs, strict=True):
        value.name = info.name


def strip_metadata(model: ir.Model) -> None:
    """Remove source paths and stack traces; name the producer of the file."""
    model.producer_name = "rotary_export"
    model.producer_version = __version__
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    model.graph.doc_string = None
    model.graph.name = "rotary_export"
    for index, node in enumerate(model.graph):
        node.name = f"{node.op_type}_{index}"
        node.metadata_props.clear()
        node.doc_string = None
        for value in node.outputs:
            value.metadata_props.clear()
    for value in (*model.graph.inputs, *model.graph.initializers.values()):
        value.metadata_props.clear()


def minimum_onnxruntime(opset: int) -> dict[str, str]:
    """Return the oldest ONNX Runtime that runs such a file, fused and portable.

    Measured in every dtype, with `tools/measure_minimum_ort`. Portable, older ones have bugs: in a
    fusion of opset 18 to 22's bodies; from opset 23 on, see `spec.MINIMUM_NATIVE_ORT`.
    """
    fused = {22: "1.21", 23: "1.23", 24: "1.24", 25: "1.24"}
    portable = "1.22" if opset < NATIVE_OPSET else spec.MINIMUM_NATIVE_ORT
    return {"fused": fused.get(opset, "1.20"), "portable": portable}
