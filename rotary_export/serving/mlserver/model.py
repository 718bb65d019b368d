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
from rotary_export.serving.batcher import Batcher
from rotary_export.serving.core import ServedModel
from rotary_export.serving.metrics import get_metrics

opened: dict[str, ServedModel] = {}  # by name: what `serve` has opened, until it is taken


class RotaryModel(mlserver.MLModel):  # type: ignore[misc]  # mlserver has no types
    """One graph of a bundle.

    Of model-settings.json, `parameters.uri` is the bundle's folder, `parameters.extra` has the
    arguments of `ServedModel` and `max_batch_delay_ms`. MLServer's own batching stays off: it joins
    requests before anyone has looked at them, and one bad id fails all.
    """

    async def load(self) -> bool:
        """Open the bundle."""
        arguments = dict(self.settings.parameters.extra or {})
        delay = arguments.pop("max_batch_delay_ms", 0) / 1000
        served = opened.pop(self.name, None) or ServedModel(
            await get_model_uri(self.settings), **arguments, name=self.name
        )
        kernel_path, together = get_metrics()
        kernel_path.labels(model=self.name, kernel_path=served.kernel_path).set(1)
        self._served = served
        self._batcher = Batcher(served, together.labels(model=self.name).observe, delay)
        self.settings.platform = served.metadata["platform"]
        self.settings.versions = served.metadata["versions"]
        self.inputs, self.outputs = (
            [types.MetadataTensor(**tensor) for tensor in served.metadata[kind]]
            for kind in ("inputs", "outputs")
        )
        return True

    async def predict(self, payload: Any) -> Any:
        """Answer one request; it is checked by itself, and run with those that wait beside it."""
        try:
            inputs = {}
            for tensor in payload.inputs:
                if tensor.name in inputs:
                    raise RotaryExportError(f"the input {tensor.name!r} is given twice")
                data = getattr(tensor.data, "root", tensor.data)
                inputs[tensor.name] = self._served.decode(
                    tensor.name, tensor.datatype, tensor.shape, data
                )
            wanted = self._served.find_outputs([tensor.name for tensor in payload.outputs or ()])
            outputs = await self._batcher.run(inputs)
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
            datatype=self._served.datatypes[name],
            data=types.TensorData.model_construct(root=value.reshape(-1).tolist()),
        )


def _is_json(payload: Any) -> bool:
    """Whether a request came over HTTP: gRPC's has no header of this name."""
    return "host" in (getattr(payload.parameters, "headers", None) or {})


def _refuse_infinite(outputs: Mapping[str, Any]) -> None:
    """Refuse what JSON can't say: it would be null, which is a NaN."""
    for name, value in outputs.items():
        if value.dtype.kind == "f" and np.isinf(value).any():
            raise RotaryExportError(f"{name} must be finite for JSON, got inf; use gRPC")
