"""The options of serving, each stated once: of the model, and of `rotary-export serve`."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from rotary_export.serving.batcher import Batcher
from rotary_export.serving.core import MAX_BATCH_SIZE, ServedModel
from rotary_export.serving.ports import Addresses, find_ports

# Of `serve --engine`: each module has a `serve(options, report_ready)`.
ENGINES = {
    "mlserver": "rotary_export.serving.mlserver.engine",
    "ray": "rotary_export.serving.ray.engine",
}


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """How a bundle is served: `extra` of a model-settings.json, arguments of Ray's `build_app`.

    Attributes:
        name: Of the model; None: the bundle's.
        graph: None: "rotate" or "model", whichever the bundle has.
        runtime: A key of `PLATFORMS`.
        allow_code: Open a TorchScript file, whose code runs here.
        max_batch_size: Largest number of rows of a run.
        max_batch_delay_ms: Longest time that a request waits to be batched.
    """

    name: str | None = None
    graph: str | None = None
    runtime: str = "onnxruntime"
    allow_code: bool = False
    max_batch_size: int = MAX_BATCH_SIZE
    max_batch_delay_ms: float = 0.0

    def to_arguments(self) -> dict[str, Any]:
        """Return the options of the model as arguments of this class."""
        return {field.name: getattr(self, field.name) for field in fields(ModelOptions)}

    def open_bundle(self, bundle_dir: str | os.PathLike[str]) -> ServedModel:
        """Open a bundle; raises as `ServedModel`."""
        return ServedModel(
            bundle_dir,
            self.graph,
            self.runtime,
            allow_code=self.allow_code,
            max_batch_size=self.max_batch_size,
            name=self.name,
        )

    def make_batcher(self, served: ServedModel, on_batch: Callable[[int], None]) -> Batcher:
        """Return the batcher of an opened bundle.

        Args:
            served: The bundle.
            on_batch: Called with the number of requests of each batch.
        """
        return Batcher(served, on_batch, self.max_batch_delay_ms / 1000)


@dataclass(frozen=True, kw_only=True)
class Options(ModelOptions):
    """The options of `rotary-export serve`.

    Attributes:
        bundle: Its folder.
        host: To listen on.
        http_port: 0: a free one.
        grpc_port: 0: a free one.
        metrics_port: 0: a free one.
        max_request_mib: Largest body of a request; None: as `find_largest_body`.
        replicas: Number of processes that run the model; more than one only with Ray.
    """

    bundle: Path
    host: str
    http_port: int
    grpc_port: int
    metrics_port: int
    max_request_mib: int | None
    replicas: int

    def open(self) -> ServedModel:
        """Open the bundle; raises as `ServedModel`."""
        return self.open_bundle(self.bundle)

    def find_addresses(self) -> Addresses:
        """Return the addresses to listen on; raises as `find_ports`."""
        ports = find_ports(self.host, self.http_port, self.grpc_port, self.metrics_port)
        return Addresses(self.host, *ports)
