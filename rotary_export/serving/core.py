"""A served bundle: each request is checked by itself, then they run together."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rotary_export.bundle.dims import BATCH
from rotary_export.bundle.manifest import (
    GraphInfo,
    Manifest,
    TensorInfo,
    read_manifest,
)
from rotary_export.errors import RotaryExportError
from rotary_export.runtime.load import load
from rotary_export.runtime.session import check_session_inputs
from rotary_export.runtime.tensors import make_bfloat16
from rotary_export.types import Array, Arrays

# The protocol's name of each runtime.
PLATFORMS = {"onnxruntime": "onnxruntime_onnx", "torchscript": "pytorch_torchscript"}
MAX_BATCH_SIZE = 64
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


class ServedModel:
    """One graph of a bundle, and its metadata in the Open Inference Protocol.

    Arrays have the protocol's datatypes. No datatype for bfloat16 works in every server, so it is
    FP32: rounded to bfloat16 in requests, exact in answers.

    Args:
        bundle_dir: The bundle's folder.
        graph: Default: "rotate" or "model", whichever the bundle has.
        runtime: A key of PLATFORMS.
        allow_code: Open a TorchScript file, whose code runs here. Without it, an error.
        max_batch_size: Largest number of rows of a run; a request of more runs alone.
        name: Of the model; default: the bundle's.

    Attributes:
        metadata: The model's metadata, as the protocol's JSON; a dynamic size is -1.
        kernel_path: As `Session.kernel_path`.
        providers: As `Session.providers`.
        batches: Whether requests run together.
        max_batch_size: Largest number of rows of a run.
        datatypes: The protocol's datatype of each output.

    Raises:
        RotaryExportError: As `load`.
    """

    def __init__(
        self,
        bundle_dir: str | os.PathLike[str],
        graph: str | None = None,
        runtime: str = "onnxruntime",
        *,
        allow_code: bool = False,
        max_batch_size: int = MAX_BATCH_SIZE,
        name: str | None = None,
    ) -> None:
        if runtime not in PLATFORMS:
            raise RotaryExportError(
                f"runtime must be one of {', '.join(PLATFORMS)}, got {runtime!r}"
            )
        if max_batch_size < 1:
            raise RotaryExportError(f"max_batch_size must be >= 1, got {max_batch_size}")
        path = Path(bundle_dir)
        manifest = read_manifest(path)
        self._session = load(path, graph, runtime, allow_code=allow_code)
        self._info = self._session.graph
        self._inputs = {info.name: info for info in self._info.inputs}
        self._axes = find_batch_axes(manifest, self._info)
        self.max_batch_size = min(max_batch_size, self._info.max_size.get(BATCH, max_batch_size))
        self.batches = self._axes is not None and self.max_batch_size > 1
        self.kernel_path = self._session.kernel_path
        self.providers = self._session.providers
        self.metadata: dict[str, Any] = {
            "name": name or manifest.name,
            "versions": ["1"],
            "platform": PLATFORMS[runtime],
            "inputs": [_describe(info) for info in self._info.inputs],
            "outputs": [_describe(info) for info in self._info.outputs],
        }
        self.datatypes = {info.name: DATATYPES[info.dtype] for info in self._info.outputs}

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
        info = self._find_input(name)
        expected = DATATYPES[info.dtype]
        if datatype != expected:
            raise RotaryExportError(f"{name} must have the datatype {expected}, got {datatype}")
        sizes = tuple(shape)
        if any(size < 0 for size in sizes):
            raise RotaryExportError(f"{name} must have a shape without negatives, got {sizes}")
        values = _read_numbers(name, data, _find_wire_dtype(info), expected)
        count = 1
        for size in sizes:
            count *= size  # Python's integers do not overflow
        if values.size != count:
            raise RotaryExportError(
                f"{name} must have {count} numbers for its shape {sizes}, got {values.size}"
            )
        return values.reshape(sizes)

    def find_outputs(self, names: Sequence[str]) -> list[str]:
        """Return the outputs that a request names, or all.

        Raises:
            RotaryExportError: The graph has no such output.
        """
        for name in names:
            if name not in self.datatypes:
                raise RotaryExportError(
                    f"{self._session.graph_name} has no output {name!r}; it returns "
                    f"{', '.join(self.datatypes)}"
                )
        return list(dict.fromkeys(names)) or list(self.datatypes)

    def check(self, inputs: Arrays) -> dict[str, Array]:
        """Check one request.

        Args:
            inputs: Arrays by name.

        Returns:
            Arrays as the session accepts them.

        Raises:
            RotaryExportError: An input is missing, unknown, of a wrong dtype or shape, or outside
                its limits.
        """
        checked = dict(inputs)
        for name, value in inputs.items():
            if self._find_input(name).dtype == "bfloat16" and value.dtype == np.float32:
                checked[name] = value.astype(make_bfloat16())
        check_session_inputs(self._session.graph_name, self._info, checked)
        return checked

    def run_many(self, requests: Sequence[Arrays]) -> list[dict[str, Array] | RotaryExportError]:
        """Run requests, together where that changes no answer; an invalid one fails alone.

        Args:
            requests: Arrays by name, for each request.

        Returns:
            For each request its outputs by name, or its error.
        """
        results: list[dict[str, Array] | RotaryExportError | None] = [None] * len(requests)
        groups: dict[object, list[tuple[int, dict[str, Array]]]] = {}
        for index, request in enumerate(requests):
            try:
                checked = self.check(request)
            except RotaryExportError as error:
                results[index] = error
            else:
                key = self._find_group(checked) if self.batches else index
                groups.setdefault(key, []).append((index, checked))
        for group in groups.values():
            for run in self._divide(group):
                outputs = self._run_together([inputs for _, inputs in run])
                for (index, _), output in zip(run, outputs, strict=True):
                    results[index] = output
        return [result for result in results if result is not None]

    def _find_input(self, name: str) -> TensorInfo:
        if name not in self._inputs:
            raise RotaryExportError(
                f"{self._session.graph_name} has no input {name!r}; it accepts "
                f"{', '.join(self._inputs)}"
            )
        return self._inputs[name]

    def _count_rows(self, inputs: Arrays) -> int:
        assert self._axes is not None
        name = self._info.inputs[0].name
        return int(inputs[name].shape[self._axes[name]])

    def _find_group(self, inputs: Arrays) -> object:
        """Return the sizes that requests must share to run together: all but the batch's."""
        assert self._axes is not None
        return tuple(
            size
            for name in self._inputs
            for axis, size in enumerate(inputs[name].shape)
            if axis != self._axes[name]
        )

    def _divide(
        self, group: Sequence[tuple[int, dict[str, Array]]]
    ) -> list[list[tuple[int, dict[str, Array]]]]:
        """Divide requests into runs of at most `max_batch_size` rows."""
        if not self.batches:
            return [[request] for request in group]
        runs: list[list[tuple[int, dict[str, Array]]]] = []
        room = 0
        for request in group:
            rows = self._count_rows(request[1])
            if not runs or rows > room:
                runs.append([])
                room = self.max_batch_size
            runs[-1].append(request)
            room -= rows
        return runs

    def _run_together(
        self, requests: Sequence[dict[str, Array]]
    ) -> list[dict[str, Array] | RotaryExportError]:
        """Run checked requests in one call; if it fails, run each by itself."""
        if len(requests) == 1:
            return [self._run_one(requests[0])]
        assert self._axes is not None
        joined = {
            name: np.concatenate([request[name] for request in requests], self._axes[name])
            for name in self._inputs
        }
        outputs = self._run_one(joined)
        if isinstance(outputs, RotaryExportError):
            return [self._run_one(request) for request in requests]
        ends = np.cumsum([self._count_rows(request) for request in requests])[:-1]
        parts = {name: np.split(value, ends, self._axes[name]) for name, value in outputs.items()}
        return [{name: parts[name][i] for name in parts} for i in range(len(requests))]

    def _run_one(self, inputs: Arrays) -> dict[str, Array] | RotaryExportError:
        try:
            outputs = self._session(**inputs)
        except RotaryExportError as error:
            return error
        except Exception as error:  # an error of a torch operator, of any type
            return RotaryExportError(f"{self._session.graph_name} failed: {error}")
        return {
            info.name: np.asarray(outputs[info.name]).astype(_find_wire_dtype(info), copy=False)
            for info in self._info.outputs
        }


def find_batch_axes(manifest: Manifest, graph: GraphInfo) -> dict[str, int] | None:
    """Return the batch axis of every input and output; None: requests can't run together.

    Every tensor must have that axis, and no row's answer may depend on another row: with dynamic
    and longrope, the longest sequence of the batch selects the angles.
    """
    rope = manifest.config.get("rope") or {}
    if manifest.config.get("length_thresholds") or rope.get("rope_type") in ("dynamic", "longrope"):
        return None
    axes = {}
    for info in (*graph.inputs, *graph.outputs):
        if info.shape.count(BATCH) != 1:
            return None
        axes[info.name] = info.shape.index(BATCH)
    return axes


def _find_wire_dtype(info: TensorInfo) -> np.dtype[Any]:
    return np.dtype("float32" if info.dtype == "bfloat16" else info.dtype)


def _describe(info: TensorInfo) -> dict[str, Any]:
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
