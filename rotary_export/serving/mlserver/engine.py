"""`rotary-export serve`: MLServer in this process, with one model."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from typing import Any

from rotary_export.compat.mlserver import get_http_app
from rotary_export.errors import RotaryExportError
from rotary_export.package import describe_missing
from rotary_export.serving.options import Options
from rotary_export.types import Progress

try:
    import mlserver
    from mlserver.errors import MLServerError, ModelNotFound
    from mlserver.repository import ModelRepository

    from rotary_export.serving.mlserver.http_guard import add_guards
    from rotary_export.serving.mlserver.model import RotaryModel, opened
except ImportError as error:
    raise RotaryExportError(describe_missing("serve", error.name, "serve")) from None

_MIB = 2**20
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
    },
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
    limit = options.max_request_mib * _MIB
    settings = mlserver.Settings(
        debug=False,
        gzip_enabled=False,  # ten times slower than everything else together
        logging_settings=_LOGGING,
        server_name="rotary_export",
        parallel_workers=0,
        **asdict(addresses),
        grpc_max_message_length=limit,
        model_repository_implementation=_OneModel,
        model_repository_implementation_args={"settings": model},
    )
    line = addresses.describe(name, served.kernel_path)
    asyncio.run(_run(settings, model, limit, lambda: report_ready(line)))


async def _run(settings: Any, model: Any, limit: int, ready: Callable[[], None]) -> None:
    server = mlserver.MLServer(settings)  # it handles the signals
    add_guards(get_http_app(server), limit)
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
