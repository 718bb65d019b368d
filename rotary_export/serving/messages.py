"""The Open Inference Protocol's messages: read to arrays, written from arrays.

JSON over HTTP, with or without binary tensors, and gRPC.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from rotary_export.errors import RotaryExportError
from rotary_export.serving.interface import DATATYPES, Interface
from rotary_export.serving.json_text import read_json, write_json
from rotary_export.types import Array, Arrays

EXTENSIONS = ["binary_tensor_data"]
HEADER_LENGTH = "Inference-Header-Content-Length"  # of the JSON that binary tensors follow
WIRE_DTYPES = {wire: np.dtype(name) for name, wire in DATATYPES.items() if name != "bfloat16"}
# gRPC's fields of numbers that are not raw; FP16 has none.
CONTENTS = {
    "BOOL": "bool_contents",
    "UINT8": "uint_contents",
    "INT8": "int_contents",
    "INT32": "int_contents",
    "INT64": "int64_contents",
    "FP32": "fp32_contents",
    "FP64": "fp64_contents",
}
_PART = 1 << 16


class RefusedError(RotaryExportError):
    """A refused request.

    Args:
        status: Of HTTP.
        message: What must hold, and what was given.

    Attributes:
        status: Of HTTP; that of every other error of a request is 400.
    """

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class InferCall:
    """One request.

    Attributes:
        inputs: Arrays by name.
        outputs: The requested names, and whether as binary tensors; empty: all outputs.
        binary: Whether outputs that are not named are sent as binary tensors.
        id: Returned with the answer.
    """

    inputs: dict[str, Array]
    outputs: dict[str, bool] = field(default_factory=dict)
    binary: bool = False
    id: str = ""


def read_http(interface: Interface, body: bytes, header_length: str | None) -> InferCall:
    """Read the body of an HTTP request.

    Args:
        interface: Of the model.
        body: JSON, followed by binary tensors if `header_length` is given.
        header_length: The value of HEADER_LENGTH.

    Raises:
        RotaryExportError: It is not a message of the protocol, or does not match the model.
    """
    size = len(body)
    if header_length is not None:
        if not header_length.isdecimal() or int(header_length) > size:
            raise RotaryExportError(
                f"{HEADER_LENGTH} must be a number <= the size of the body, {size}, "
                f"got {header_length!r}"
            )
        size = int(header_length)
    request = _Object("the request", read_json(body[:size]))
    rest = memoryview(body)[size:]
    inputs: dict[str, Array] = {}
    for tensor in request.get_objects("inputs"):
        name = tensor.get_str("name")
        datatype, shape = tensor.get_str("datatype"), tensor.get_shape()
        data_size = tensor.get_parameters().value.get("binary_data_size")
        if data_size is None:
            data: Any = tensor.get("data", list)
        else:
            if type(data_size) is not int or not 0 <= data_size <= len(rest):
                raise RotaryExportError(
                    f"{name}: binary_data_size must be >= 0 and <= the {len(rest)} bytes left of "
                    f"the body, got {data_size!r}"
                )
            data, rest = _read_raw(name, datatype, rest[:data_size]), rest[data_size:]
        _add(inputs, name, interface.decode(name, datatype, shape, data))
    if len(rest):
        raise RotaryExportError(f"the body has {len(rest)} bytes after its inputs")
    binary = request.get_parameters().value.get("binary_data_output") is True
    outputs = {}
    for output in request.get_objects("outputs") if "outputs" in request.value else []:
        is_binary = output.get_parameters().value.get("binary_data", binary)
        outputs[output.get_str("name")] = is_binary is True
    interface.find_outputs(list(outputs))
    id_ = request.get_str("id") if "id" in request.value else ""
    return InferCall(inputs, outputs, binary, id_)


def write_http(
    interface: Interface, call: InferCall, outputs: Arrays
) -> tuple[bytes, dict[str, str]]:
    """Return the body of the answer to an HTTP request, and its headers.

    Raises:
        RotaryExportError: An output is infinite, which JSON can't represent.
    """
    tensors, raw = [], []
    for name in call.outputs or outputs:
        value = outputs[name]
        tensor = _describe(name, value)
        if call.outputs.get(name, call.binary):
            raw.append(np.ascontiguousarray(value).tobytes())
            tensor["parameters"] = {"binary_data_size": len(raw[-1])}
        else:
            tensor["data"] = _to_json(name, value)
        tensors.append(tensor)
    answer: dict[str, Any] = {
        "model_name": interface.model,
        "model_version": interface.version,
        "outputs": tensors,
    }
    if call.id:
        answer["id"] = call.id
    header = write_json(answer)
    if not raw:
        return header, {"Content-Type": "application/json"}
    headers = {"Content-Type": "application/octet-stream", HEADER_LENGTH: str(len(header))}
    return b"".join((header, *raw)), headers


def read_grpc(interface: Interface, request: Any) -> InferCall:
    """Read a ModelInferRequest; raises as `read_http`."""
    raws = request.raw_input_contents
    if raws and len(raws) != len(request.inputs):
        raise RotaryExportError(
            f"raw_input_contents must contain one item for each of {len(request.inputs)} inputs, "
            f"or none at all, got {len(raws)}"
        )
    inputs: dict[str, Array] = {}
    for index, tensor in enumerate(request.inputs):
        if raws:
            data: Any = _read_raw(tensor.name, tensor.datatype, raws[index])
        else:
            field = CONTENTS.get(tensor.datatype, "bytes_contents")
            data = _read_contents(getattr(tensor.contents, field))
        array = interface.decode(tensor.name, tensor.datatype, tuple(tensor.shape), data)
        _add(inputs, tensor.name, array)
    outputs = {output.name: True for output in request.outputs}
    interface.find_outputs(list(outputs))
    return InferCall(inputs, outputs, id=request.id)


def write_grpc(
    interface: Interface, call: InferCall, outputs: Arrays, make_answer: Callable[..., Any]
) -> Any:
    """Return the answer to a gRPC request; its tensors are raw.

    Args:
        interface: Of the model.
        call: The request.
        outputs: Of the model, by name.
        make_answer: ModelInferResponse, of the server's own messages.
    """
    answer = make_answer(model_name=interface.model, model_version=interface.version, id=call.id)
    for name in call.outputs or outputs:
        answer.outputs.add(**_describe(name, outputs[name]))
        answer.raw_output_contents.append(np.ascontiguousarray(outputs[name]).tobytes())
    return answer


class _Object:
    """A JSON object of a request; each part is read with its type checked."""

    def __init__(self, where: str, value: object) -> None:
        if not isinstance(value, dict):
            raise RotaryExportError(f"{where} must be an object, got {type(value).__name__}")
        self.where = where
        self.value = value

    def get(self, key: str, kind: type) -> Any:
        value = self.value.get(key)
        if not isinstance(value, kind):
            given = type(value).__name__ if key in self.value else "nothing"
            raise RotaryExportError(
                f"{self.where} must have {key!r}, a {kind.__name__}, got {given}"
            )
        return value

    def get_str(self, key: str) -> str:
        return str(self.get(key, str))

    def get_objects(self, key: str) -> list[_Object]:
        values = self.get(key, list)
        return [_Object(f"{key}[{index}]", value) for index, value in enumerate(values)]

    def get_parameters(self) -> _Object:
        return _Object(f"parameters of {self.where}", self.value.get("parameters", {}))

    def get_shape(self) -> Sequence[int]:
        shape = self.get("shape", list)
        if any(type(size) is not int for size in shape):
            raise RotaryExportError(f"shape of {self.where} must contain integers, got {shape}")
        return tuple(shape)


def _add(inputs: dict[str, Array], name: str, value: Array) -> None:
    if name in inputs:
        raise RotaryExportError(f"the input {name!r} must be given once, got it twice")
    inputs[name] = value


def _read_raw(name: str, datatype: str, data: bytes | memoryview) -> Array:
    """Return raw little-endian numbers as an array; an unknown datatype is `decode`'s to refuse."""
    dtype = WIRE_DTYPES.get(datatype, np.dtype("uint8"))
    if len(data) % dtype.itemsize:
        raise RotaryExportError(
            f"{name} must contain {datatype} numbers of {dtype.itemsize} bytes each, "
            f"got {len(data)} bytes"
        )
    return np.frombuffer(data, dtype.newbyteorder("<"))


def _describe(name: str, value: Array) -> dict[str, Any]:
    return {"name": name, "datatype": DATATYPES[value.dtype.name], "shape": list(value.shape)}


def _to_json(name: str, value: Array) -> Array:
    """Return flat numbers for `write_json`.

    The shortest text of a float32 would do for clients that read a float32. One that reads a
    float64 and rounds it has another neighbour for one of them, 7.038531e-26.
    """
    flat = np.ascontiguousarray(value).reshape(-1)
    if value.dtype.kind != "f":
        return flat
    if np.isinf(flat).any():
        raise RotaryExportError(
            f"{name} must be finite for JSON, got inf; use binary data, or gRPC"
        )
    return flat.astype(np.float64)


def _read_contents(field: Sequence[Any]) -> Array | list[Any]:
    """Return the numbers of one of CONTENTS.

    Part by part: other threads run in between.
    """
    parts = [np.array(field[at : at + _PART]) for at in range(0, len(field), _PART)]
    return np.concatenate(parts) if parts else []
