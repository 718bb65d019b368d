"""MLServer: what is inside a server that was not started yet."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractAsyncContextManager, nullcontext
from typing import Any


def get_http_app(server: Any) -> Any:
    """Return the FastAPI application of an `mlserver.MLServer`."""
    return server._rest_server._app


def open_call(server: Any, name: str, version: str | None) -> AbstractAsyncContextManager[Any]:
    """Return a context that counts and times one call, in MLServer's metrics.

    Args:
        server: An `mlserver.MLServer`.
        name: Of the model.
        version: Of the model; None: any.

    Returns:
        The context, which is the model; it raises an `MLServerError` if there is none.
    """
    context: AbstractAsyncContextManager[Any]
    context = server._data_plane._infer_contextmanager(name, version)
    return context


def configure_http(server: Any, make_protocol: Callable[[], type[Any]], silent_s: int) -> None:
    """Set the protocol of connections to the ports of HTTP and of metrics, one for each port.

    Connections are kept for `silent_s` seconds after an answer.

    uvicorn's own handling of signals is turned off: it raises a signal again once a server has
    ended, which interrupts the others. MLServer has its own.
    """
    for each in (server._rest_server, server._metrics_server):
        each._get_config = _change_config(each._get_config, make_protocol(), silent_s)
    for module in _list_modules():
        module._NoSignalServer.capture_signals = lambda self: nullcontext()


def _change_config(
    get_config: Callable[[], Any], protocol: type[Any], silent_s: int
) -> Callable[[], Any]:
    def get() -> Any:
        config = get_config()
        config.http = protocol
        config.timeout_keep_alive = silent_s
        return config

    return get


def _list_modules() -> list[Any]:
    from mlserver.metrics import server as metrics
    from mlserver.rest import server as rest

    return [metrics, rest]


def configure_grpc(
    server: Any, service: type[Any], largest_message: int, connections: int, silent_s: float
) -> None:
    """Set the gRPC service and its limits.

    Args:
        server: An `mlserver.MLServer`.
        service: The class of the service.
        largest_message: Of a request, in bytes.
        connections: At a time.
        silent_s: Seconds in which a connection must start its first call.
    """
    from mlserver.grpc import server as grpc_server

    grpc_server.InferenceServicer = service
    server._grpc_server._get_options = lambda: [
        ("grpc.max_receive_message_length", largest_message),
        ("grpc.max_send_message_length", -1),
        ("grpc.max_allowed_incoming_connections", connections),
        ("grpc.server_handshake_timeout_ms", round(1000 * silent_s)),
    ]
