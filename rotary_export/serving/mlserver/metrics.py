"""The metrics of a served model, in Prometheus' client."""

from __future__ import annotations

import functools

from prometheus_client import Gauge, Histogram

from rotary_export.serving.metrics import BUCKETS, KERNEL_PATH, REQUESTS_TOGETHER


@functools.cache
def get_metrics() -> tuple[Gauge, Histogram]:
    """Return the kernel path of each model, and the number of requests of each batch.

    Registered by the first call, not on import: MLServer's workers replace the registry before it.
    """
    return (
        Gauge(*KERNEL_PATH, ["model", "kernel_path"]),
        Histogram(*REQUESTS_TOGETHER, ["model"], buckets=BUCKETS),
    )
