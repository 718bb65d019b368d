"""MLServer: the HTTP application inside a server."""

from __future__ import annotations

from typing import Any


def get_http_app(server: Any) -> Any:
    """Return the FastAPI application of an `mlserver.MLServer` that was not started yet."""
    return server._rest_server._app
