"""Private names and undocumented settings of MLServer and Ray."""

from __future__ import annotations

from typing import Any


def get_http_app(server: Any) -> Any:
    """Return the FastAPI application of an `mlserver.MLServer` that was not started yet."""
    return server._rest_server._app


def get_ray_settings(folder: str, metrics_port: int) -> dict[str, Any]:
    """Return the arguments of `ray.init` that choose its folder and the port of its metrics."""
    return {"_temp_dir": folder, "_metrics_export_port": metrics_port}
