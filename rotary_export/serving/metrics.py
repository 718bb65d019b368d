"""Prometheus metrics of a served model, beside the server's own."""

from __future__ import annotations

import functools

from prometheus_client import Gauge, Histogram


@functools.cache
def get_metrics() -> tuple[Gauge, Histogram]:
    """Return the kernel path of each model, and how many requests were taken together.

    Registered with the first call, not on import: MLServer's workers change their kind before.
    """
    return (
        Gauge(
            "rotary_export_kernel_path",
            "What computes the rotary nodes; the value is 1.",
            ["model", "kernel_path"],
        ),
        Histogram(
            "rotary_export_requests_together",
            "Requests that were taken from the queue together.",
            ["model"],
            buckets=(1, 2, 4, 8, 16, 32, 64, 128),
        ),
    )
