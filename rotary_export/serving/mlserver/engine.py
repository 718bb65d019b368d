"""`rotary-export serve`: MLServer in this process, with one model."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from typing import Any

from rotary_export.compat.mlserver import configure_grpc, configure_http, get_http_app
from rotary_export.compat.uvicorn import make_limited_protocol
from rotary_export.errors import RotaryExportError
from rotary_export.package import describe_missing
from rotary_export.serving.messages import EXTENSIONS
from rotary_export.serving.options import Options
from rotary_export.serving.size_limits import find_largest_body
from rotary_export.types import Progress

try:
    import mlserver
    from mlserver.errors import MLServerError, ModelNotFound
    from mlserver.repository import ModelRepository

    from rotary_export.serving.http import HttpInfer
    from rotary_export.serving.mlserver.grpc_front import make_service
    from rotary_export.serving.mlserver.http_front import add_front
    from rotary_export.serving.mlserver.model import RotaryModel, opened
except ImportError as error:
    raise RotaryExportError(describe_missing("serve", error.name, "serve")) from None

_CONNECTIONS = 256  # of HTTP, and of gRPC
_MAX_WORKERS = 8
_SILENT_S = 15  # of a client that sends a request, or reads an answer
_POLL_S = 0.05


class _NoRefusals(logging.Filter):
    """Drops errors that were returned to a client: they are not errors of the server."""

    def filter(self, record: logging.LogRecord) -> bool:
        return not (record.exc_info and isinstance(record.exc_info[1], MLServerError))


# MLServer and uvicorn: warnings and errors only, on standard error.
_LOGGING = {
    "version": 1,
    "disable_existing_loggers": False,
    "filters": {"no_refusals": {"()": _NoRefusals}},
    "handlers": {"stderr": {"class": "logging.StreamHandler", "filters": ["no_refusals"]}},
    "loggers": {
        name: {"handlers": ["stderr"], "level": "WARNING", "propagate": False}
        for name in ("mlserver", "uvicorn")
    }
    | {"asyncio": {"level": "ERROR"}},  # it warns of a worker process that ended before its wait
}


class _OneModel(ModelRepository):  # type: ignore[misc]  # mlserver has no types
    """A repository of this model only: a client can't load another."""

    def __init__(self, root: str, settings: Any) -> None:
        self._settings = settings

    async def list(self) -> Any:
        return [self._settings]

    async def find(self, name: str) -> Any:
        if name != self._settings.name:
            raise ModelNotFound(name)
        return [self._settings]


def serve(options: Options, report_ready: Progress) -> None:
    """Serve a bundle until SIGTERM or SIGINT; in-flight requests are completed first.

    Args:
        options: What to serve, and where.
        report_ready: Called with one line, once every port answers.

    Raises:
        RotaryExportError: The bundle can't be served, or a port is already in use.
    """
    served = options.open()
    name = served.metadata["name"]
    addresses = options.find_addresses()
    opened[name] = served
    model = mlserver.ModelSettings(
        name=name,
        implementation=RotaryModel,
        max_batch_size=0,  # MLServer's own
        parameters={
            "uri": str(options.bundle),
            "version": served.metadata["versions"][0],
            "extra": options.to_arguments(),
        },
    )
    settings = mlserver.Settings(
        debug=False,
        gzip_enabled=False,  # ten times slower than everything else together
        logging_settings=_LOGGING,
        server_name="rotary_export",
        extensions=EXTENSIONS,
        parallel_workers=0,
        **asdict(addresses),
        model_repository_implementation=_OneModel,
        model_repository_implementation_args={"settings": model},
    )
    line = addresses.describe(name, served.kernel_path)
    largest = find_largest_body(served.largest_request, options.max_request_mib)
    infer = HttpInfer(served.interface, largest, min(_MAX_WORKERS, os.cpu_count() or 1))
    asyncio.run(_run(settings, model, infer, lambda: report_ready(line)))


async def _run(settings: Any, model: Any, infer: HttpInfer, ready: Callable[[], None]) -> None:
    server = mlserver.MLServer(settings)  # it handles the signals
    add_front(get_http_app(server), server, infer)
    configure_http(server, lambda: make_limited_protocol(_CONNECTIONS, _SILENT_S), _SILENT_S)
    service = make_service(server, infer.interface)
    configure_grpc(server, service, infer.largest_body, _CONNECTIONS, _SILENT_S)
    await infer.workers.start()
    announced = asyncio.create_task(_announce(settings, model.name, ready))
    try:
        await server.start([model])
    finally:
        announced.cancel()


async def _announce(settings: Any, name: str, ready: Callable[[], None]) -> None:
    """Call `ready` once the model is loaded and every port answers."""
    while name in opened:
        await asyncio.sleep(_POLL_S)
    for port in (settings.http_port, settings.grpc_port, settings.metrics_port):
        while not await _answers(settings.host, port):
            await asyncio.sleep(_POLL_S)
    ready()


async def _answers(host: str, port: int) -> bool:
    with suppress(OSError):
        _, writer = await asyncio.open_connection(host, port)
        writer.close()
        return True
    return False
