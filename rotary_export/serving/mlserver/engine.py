"""The embedded server: MLServer in this process, with one model."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from rotary_export.errors import RotaryExportError
from rotary_export.serving.options import Options
from rotary_export.serving.ports import find_ports

try:
    import mlserver
    from mlserver.errors import MLServerError, ModelNotFound
    from mlserver.repository import ModelRepository

    from rotary_export.serving.http_guard import add_guards
    from rotary_export.serving.mlserver.model import RotaryModel, opened
except ImportError as error:
    raise RotaryExportError(
        f"serve needs {error.name}: pip install 'rotary_export[serve]'"
    ) from None

_MIB = 2**20
_POLL_S = 0.05


class _NoRefusals(logging.Filter):
    """Lets through all but what a client was told: it is no trouble of the server's."""

    def filter(self, record: logging.LogRecord) -> bool:
        return not (record.exc_info and isinstance(record.exc_info[1], MLServerError))


# Of MLServer and uvicorn: troubles alone, on standard error.
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
    """The repository: this model; a client can name no other to be loaded."""

    def __init__(self, root: str, settings: Any) -> None:
        self._settings = settings

    async def list(self) -> Any:
        return [self._settings]

    async def find(self, name: str) -> Any:
        if name != self._settings.name:
            raise ModelNotFound(name)
        return [self._settings]


def serve(options: Options, say: Callable[[str], None]) -> None:
    """Serve a bundle until SIGTERM or SIGINT; requests that are in are answered first.

    Args:
        options: What to serve, and where.
        say: Called with one line, once the server answers.

    Raises:
        RotaryExportError: The bundle can't be served, or a port is taken.
    """
    served = options.open()
    name, host = served.metadata["name"], options.host
    ports = find_ports(host, options.http_port, options.grpc_port, options.metrics_port)
    opened[name] = served
    model = mlserver.ModelSettings(
        name=name,
        implementation=RotaryModel,
        max_batch_size=0,  # MLServer's own
        parameters={
            "uri": str(options.bundle),
            "version": served.metadata["versions"][0],
            "extra": {
                "graph": options.graph,
                "runtime": options.runtime,
                "allow_torchscript": options.allow_torchscript,
                "max_batch_size": options.max_batch_size,
                "max_batch_delay_ms": options.max_batch_delay_ms,
            },
        },
    )
    limit = options.max_request_mib * _MIB
    settings = mlserver.Settings(
        debug=False,
        gzip_enabled=False,  # it takes ten times as long as all the rest
        logging_settings=_LOGGING,
        server_name="rotary_export",
        parallel_workers=0,
        host=host,
        http_port=ports[0],
        grpc_port=ports[1],
        metrics_port=ports[2],
        grpc_max_message_length=limit,
        model_repository_implementation=_OneModel,
        model_repository_implementation_args={"settings": model},
    )
    where = (
        f"serving {name} ({served.kernel_path}) on http://{host}:{ports[0]}, "
        f"grpc://{host}:{ports[1]}, metrics http://{host}:{ports[2]}/metrics"
    )
    asyncio.run(_run(settings, model, limit, lambda: say(where)))


async def _run(settings: Any, model: Any, limit: int, ready: Callable[[], None]) -> None:
    server = mlserver.MLServer(settings)  # it takes the signals
    add_guards(server._rest_server._app, limit)
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
