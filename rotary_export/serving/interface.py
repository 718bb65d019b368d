"""What a served graph accepts and returns, in the words of the Open Inference Protocol."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from rotary_export.bundle.manifest import GraphInfo, TensorInfo
from rotary_export.errors import RotaryExportError
from rotary_export.types import Array

DATATYPES = {
    "bool": "BOOL",
    "uint8": "UINT8",
    "int8": "INT8",
    "int32": "INT32",
    "int64": "INT64",
    "float16": "FP16",
    "float32": "FP32",
    "float64": "FP64",
    "bfloat16": "FP32",  # JSON has no BF16, nor have half of the protocol's servers
}


@dataclass(frozen=True)
class Interface:
    """One graph, without what computes it: a worker process that reads requests has a copy.

    Attributes:
        model: The name of the model.
        version: Of the model.
        graph_name: In the bundle.
        graph: Its inputs and outputs.
    """

    model: str
    version: str
    graph_name: str
    graph: GraphInfo

    @cached_property
    def inputs(self) -> dict[str, TensorInfo]:
        """The inputs by name."""
        return {info.name: info for info in self.graph.inputs}

    @cached_property
    def datatypes(self) -> dict[str, str]:
        """The protocol's datatype of each output."""
        return {info.name: DATATYPES[info.dtype] for info in self.graph.outputs}

    def decode(self, name: str, datatype: str, shape: Sequence[int], data: Any) -> Array:
        """Make the array of one input from its parts in a request.

        Args:
            name: Of the input.
            datatype: In the protocol.
            shape: Of the input.
            data: Numbers in row-major order, in a list (nested or not) or an array.

        Returns:
            The array.

        Raises:
            RotaryExportError: The graph has no such input, the datatype is not that of the input,
                or the numbers do not match the datatype or the shape.
        """
        info = self.find_input(name)
        expected = DATATYPES[info.dtype]
        if datatype != expected:
            raise RotaryExportError(f"{name} must have the datatype {expected}, got {datatype}")
        sizes = tuple(shape)
        if any(size < 0 for size in sizes):
            raise RotaryExportError(f"{name} must have a shape without negatives, got {sizes}")
        values = _read_numbers(name, data, find_wire_dtype(info), expected)
        count = 1
        for size in sizes:
            count *= size  # Python's integers do not overflow
        if values.size != count:
            raise RotaryExportError(
                f"{name} must have {count} numbers for its shape {sizes}, got {values.size}"
            )
        try:
            return values.reshape(sizes)
        except (ValueError, OverflowError):  # more dimensions, or larger ones, than numpy has
            raise RotaryExportError(
                f"{name} must have the shape ({', '.join(map(str, info.shape))}), got {sizes}"
            ) from None

    def find_outputs(self, names: Sequence[str]) -> list[str]:
        """Return the outputs that a request names, or all.

        Raises:
            RotaryExportError: The graph has no such output.
        """
        for name in names:
            if name not in self.datatypes:
                raise RotaryExportError(
                    f"{self.graph_name} has no output {name!r}; it returns "
                    f"{', '.join(self.datatypes)}"
                )
        return list(dict.fromkeys(names)) or list(self.datatypes)

    def find_input(self, name: str) -> TensorInfo:
        """Return the input of a name.

        Raises:
            RotaryExportError: The graph has no such input.
        """
        if name not in self.inputs:
            raise RotaryExportError(
                f"{self.graph_name} has no input {name!r}; it accepts {', '.join(self.inputs)}"
            )
        return self.inputs[name]


def find_wire_dtype(info: TensorInfo) -> np.dtype[Any]:
    """Return the dtype of an input's or output's arrays in requests and answers."""
    return np.dtype("float32" if info.dtype == "bfloat16" else info.dtype)


def describe_tensor(info: TensorInfo) -> dict[str, Any]:
    """Return the metadata of an input or output, as the protocol's JSON."""
    shape = [size if isinstance(size, int) else -1 for size in info.shape]
    return {"name": info.name, "datatype": DATATYPES[info.dtype], "shape": shape}


def _read_numbers(name: str, data: Any, dtype: np.dtype[Any], datatype: str) -> Array:
    """Return numbers as a flat array; values outside the datatype's range are refused."""
    wrong = RotaryExportError(f"{name} must contain {datatype} numbers")
    if isinstance(data, np.ndarray) and data.dtype == dtype:
        return data.reshape(-1)
    try:
        # JSON has no NaN; null stands for it.
        values = np.asarray(data, dtype=np.float64 if dtype.kind == "f" else None).reshape(-1)
    except (ValueError, TypeError, OverflowError):
        raise wrong from None
    if values.size == 0:
        return values.astype(dtype)
    kinds = {"f": "f", "b": "b", "u": "iu", "i": "iu"}[dtype.kind]
    if values.dtype.kind not in kinds:
        raise wrong
    with np.errstate(over="ignore"):
        cast = values.astype(dtype)
    if dtype.kind == "f":
        fits = np.isfinite(cast) == np.isfinite(values)
    else:
        fits = cast == values
    if not fits.all():
        raise RotaryExportError(f"{name} must contain {datatype} numbers, got {values[~fits][0]}")
    return cast
