"""A bundle as a runtime of MLServer: `implementation` of a model-settings.json."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import mlserver
import numpy as np
from mlserver import types
from mlserver.errors import InferenceError
from mlserver.utils import get_model_uri

from rotary_export.errors import RotaryExportError
from rotary_export.serving.core import ServedModel
from rotary_export.serving.mlserver.metrics import get_metrics
from rotary_export.serving.options import ModelOptions
from rotary_export.types import Array, Arrays

opened: dict[str, ServedModel] = {}  # by name: models that `serve` has opened, until they load


class RotaryModel(mlserver.MLModel):  # type: ignore[misc]  # mlserver has no types
    """One graph of a bundle.

    In model-settings.json, `parameters.uri` is the bundle's folder and `parameters.extra` contains
    the options: those of `ModelOptions`. MLServer's own batching stays off: it joins requests
    before they are checked, so that one bad id would fail all.
    """

    async def load(self) -> bool:
        """Open the bundle."""
        options = ModelOptions(**(self.settings.parameters.extra or {}) | {"name": self.name})
        served = opened.pop(self.name, None)
        if served is None:
            served = options.open_bundle(await get_model_uri(self.settings))
        kernel_path, together = get_metrics()
        kernel_path.labels(model=self.name, kernel_path=served.kernel_path).set(1)
        self._served = served
        self._batcher = options.make_batcher(served, together.labels(model=self.name).observe)
        self.settings.platform = served.metadata["platform"]
        self.settings.versions = served.metadata["versions"]
        self.inputs, self.outputs = (
            [types.MetadataTensor(**tensor) for tensor in served.metadata[kind]]
            for kind in ("inputs", "outputs")
        )
        return True

    async def run(self, inputs: Arrays) -> dict[str, Array]:
        """Run one request together with those that are waiting; raises as `Batcher.run`."""
        return await self._batcher.run(inputs)

    async def predict(self, payload: Any) -> Any:
        """Check one request by itself, then run it together with those that are waiting."""
        try:
            inputs = {}
            for tensor in payload.inputs:
                if tensor.name in inputs:
                    raise RotaryExportError(
                        f"the input {tensor.name!r} must be given once, got it twice"
                    )
                data = getattr(tensor.data, "root", tensor.data)
                inputs[tensor.name] = self._served.interface.decode(
                    tensor.name, tensor.datatype, tensor.shape, data
                )
            wanted = self._served.interface.find_outputs(
                [tensor.name for tensor in payload.outputs or ()]
            )
            outputs = await self.run(inputs)
            if _is_json(payload):
                _refuse_infinite({name: outputs[name] for name in wanted})
        except RotaryExportError as error:
            raise InferenceError(str(error)) from None
        return types.InferenceResponse.model_construct(
            model_name=self.name,
            model_version=self.version,
            outputs=[self._make_output(name, outputs[name]) for name in wanted],
        )

    def _make_output(self, name: str, value: Any) -> Any:
        return types.ResponseOutput.model_construct(
            name=name,
            shape=list(value.shape),
            datatype=self._served.interface.datatypes[name],
            data=types.TensorData.model_construct(root=value.reshape(-1).tolist()),
        )


def _is_json(payload: Any) -> bool:
    """Whether a request came over HTTP: gRPC's has no header of this name."""
    return "host" in (getattr(payload.parameters, "headers", None) or {})


def _refuse_infinite(outputs: Mapping[str, Any]) -> None:
    """Refuse infinities, which JSON lacks: they would be null, which is NaN."""
    for name, value in outputs.items():
        if value.dtype.kind == "f" and np.isinf(value).any():
            raise RotaryExportError(f"{name} must be finite for JSON, got inf; use gRPC")
