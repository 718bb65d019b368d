"""Ray: settings of `ray.init` that are not public."""

from __future__ import annotations

from typing import Any


def make_settings(folder: str, metrics_port: int) -> dict[str, Any]:
    """Return the arguments of `ray.init` for its folder and the port of its metrics."""
    return {"_temp_dir": folder, "_metrics_export_port": metrics_port}
