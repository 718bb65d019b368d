"""What `rotary-export serve` was asked for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rotary_export.serving.core import ServedModel

# Of `serve --engine`: each module has a `serve(options, say)`.
ENGINES = {
    "mlserver": "rotary_export.serving.mlserver.engine",
    "ray": "rotary_export.serving.ray.engine",
}


@dataclass(frozen=True)
class Options:
    """Where to listen, and what to serve.

    Attributes:
        bundle: Its folder.
        name: Of the model; None: the bundle's.
        graph: None: "rotate" or "model", whichever the bundle has.
        runtime: As `ServedModel`.
        allow_torchscript: As `ServedModel`.
        max_batch_size: As `ServedModel`.
        max_batch_delay_ms: How long a request waits for company, at most.
        host: To listen on.
        http_port: 0: a free one.
        grpc_port: 0: a free one.
        metrics_port: 0: a free one.
        max_request_mib: Of a request's body; one that is larger is refused unread.
        replicas: Processes that run the model; more than one only with Ray.
    """

    bundle: Path
    name: str | None
    graph: str | None
    runtime: str
    allow_torchscript: bool
    max_batch_size: int
    max_batch_delay_ms: float
    host: str
    http_port: int
    grpc_port: int
    metrics_port: int
    max_request_mib: int
    replicas: int

    def open(self) -> ServedModel:
        """Open the bundle."""
        return ServedModel(
            self.bundle,
            self.graph,
            self.runtime,
            allow_torchscript=self.allow_torchscript,
            max_batch_size=self.max_batch_size,
            name=self.name,
        )
