"""A bundle in Triton's Python backend: each request is checked, and valid ones run together."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import triton_python_backend_utils as triton

sys.path.insert(0, str(Path(__file__).parent))  # the package beside this file, not an installed one

from rotary_export.errors import RotaryExportError
from rotary_export.serving.core import ServedModel


class TritonPythonModel:
    """The class that the backend looks up."""

    def initialize(self, args: dict[str, str]) -> None:
        """Open the bundle beside this file."""
        config = json.loads(args["model_config"])
        size = max(1, config["max_batch_size"])
        self._served = ServedModel(Path(__file__).parent / "bundle", max_batch_size=size)
        inputs = self._served.metadata["inputs"]
        self._scalars = {tensor["name"] for tensor in inputs if not tensor["shape"]}
        triton.Logger.log_info(f"{args['model_name']}: {self._served.kernel_path}")

    def execute(self, requests: list) -> list:
        """Answer the requests of one batch of Triton's."""
        inputs = [
            {tensor.name(): self._read(tensor) for tensor in request.inputs()}
            for request in requests
        ]
        return [self._make_response(result) for result in self._served.run_many(inputs)]

    def _read(self, tensor: triton.Tensor) -> np.ndarray:
        """Return an array; a scalar of the graph arrives as (1,), since Triton has no scalars."""
        value = tensor.as_numpy()
        return value.reshape(()) if tensor.name() in self._scalars else value

    def _make_response(self, result: object) -> object:
        if isinstance(result, RotaryExportError):
            error = triton.TritonError(str(result), triton.TritonError.INVALID_ARG)
            return triton.InferenceResponse(output_tensors=[], error=error)
        return triton.InferenceResponse(
            output_tensors=[triton.Tensor(name, value) for name, value in result.items()]
        )
