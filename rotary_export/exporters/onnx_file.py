"""Writes an ONNX file weight by weight, so that no copy of all of them is ever in memory.

A serialized `onnx.ModelProto` contains its graph as one field with its length in front. The length
is known from the sizes of the weights, so that they are written one after the other, as further
`initializer` fields of the graph: https://protobuf.dev/programming-guides/encoding.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import onnx
from onnxscript import ir

_GRAPH = onnx.ModelProto.DESCRIPTOR.fields_by_name["graph"].number
_INITIALIZER = onnx.GraphProto.DESCRIPTOR.fields_by_name["initializer"].number
_LARGE = 1 << 16  # bytes of a weight that is written by itself


def take_weights(model: ir.Model) -> list[ir.Value]:
    """Turn the large weights of a model into inputs of its graph; return them."""
    large = [
        value
        for value in model.graph.initializers.values()
        if value.const_value is not None and value.const_value.nbytes >= _LARGE
    ]
    for value in large:
        del model.graph.initializers[str(value.name)]
        model.graph.inputs.append(value)
    return large


def write_model(model: onnx.ModelProto, weights: Sequence[ir.Value], path: Path) -> None:
    """Write a model with its weights.

    Args:
        model: With the weights as the last inputs of its graph, which they are no more in the file.
        weights: As `take_weights` returned them.
        path: The file to write.
    """
    graph = onnx.GraphProto()
    graph.CopyFrom(model.graph)
    del graph.input[len(graph.input) - len(weights) :]
    rest = onnx.ModelProto()
    rest.CopyFrom(model)
    rest.ClearField("graph")
    head = graph.SerializeToString()
    sizes = [_measure(weight) for weight in weights]
    total = len(head) + sum(len(_write_field(_INITIALIZER, size)) + size for size in sizes)
    with path.open("wb") as file:
        file.write(rest.SerializeToString())
        file.write(_write_field(_GRAPH, total) + head)
        for weight, size in zip(weights, sizes, strict=True):
            file.write(_write_field(_INITIALIZER, size))
            file.write(_serialize(weight).SerializeToString())


def _serialize(weight: ir.Value) -> onnx.TensorProto:
    assert weight.const_value is not None
    proto = ir.serde.serialize_tensor(weight.const_value)
    proto.name = str(weight.name)
    return proto


def _measure(weight: ir.Value) -> int:
    """Return the bytes of a serialized weight."""
    return int(_serialize(weight).ByteSize())


def _write_field(number: int, length: int) -> bytes:
    """Return what stands before a field of a length: its number, then the length, as varints."""
    return _write_varint(number << 3 | 2) + _write_varint(length)


def _write_varint(value: int) -> bytes:
    written = bytearray()
    while value >= 0x80:
        written.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*written, value])
