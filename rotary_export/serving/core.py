"""A served bundle: each request is checked by itself, then they run together."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rotary_export.bundle.dims import BATCH
from rotary_export.bundle.manifest import GraphInfo, Manifest, read_manifest
from rotary_export.errors import RotaryExportError
from rotary_export.runtime.load import load
from rotary_export.runtime.session import check_session_inputs
from rotary_export.runtime.tensors import make_bfloat16
from rotary_export.serving.interface import Interface, describe_tensor, find_wire_dtype
from rotary_export.serving.size_limits import count_numbers
from rotary_export.types import Array, Arrays

# The protocol's name of each runtime.
PLATFORMS = {"onnxruntime": "onnxruntime_onnx", "torchscript": "pytorch_torchscript"}
MAX_BATCH_SIZE = 64
VERSION = "1"  # of the model; a bundle has one


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
        interface: What it accepts and returns.
        largest_request: Numbers in the inputs of the largest request; None: not known.

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
        self.interface = Interface(
            name or manifest.name, VERSION, self._session.graph_name, self._info
        )
        self._axes = find_batch_axes(manifest, self._info)
        self.max_batch_size = min(max_batch_size, self._info.max_size.get(BATCH, max_batch_size))
        self.batches = self._axes is not None and self.max_batch_size > 1
        self.kernel_path = self._session.kernel_path
        self.providers = self._session.providers
        self.largest_request = count_numbers(manifest, self._info, self.max_batch_size)
        self.metadata: dict[str, Any] = {
            "name": self.interface.model,
            "versions": [VERSION],
            "platform": PLATFORMS[runtime],
            "inputs": [describe_tensor(info) for info in self._info.inputs],
            "outputs": [describe_tensor(info) for info in self._info.outputs],
        }

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
            if self.interface.find_input(name).dtype == "bfloat16" and value.dtype == np.float32:
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

    def _count_rows(self, inputs: Arrays) -> int:
        assert self._axes is not None
        name = self._info.inputs[0].name
        return int(inputs[name].shape[self._axes[name]])

    def _find_group(self, inputs: Arrays) -> object:
        """Return the sizes that requests must share to run together: all but the batch's."""
        assert self._axes is not None
        return tuple(
            size
            for name in self.interface.inputs
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
            for name in self.interface.inputs
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
            info.name: np.asarray(outputs[info.name]).astype(find_wire_dtype(info), copy=False)
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
