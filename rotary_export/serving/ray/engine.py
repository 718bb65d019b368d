"""`rotary-export serve --engine ray`: a bundle on Ray Serve, on this machine."""

from __future__ import annotations

import logging
import os
import secrets
import signal
import tempfile
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

from rotary_export.compat.ray import make_settings
from rotary_export.errors import RotaryExportError
from rotary_export.package import describe_missing
from rotary_export.serving.options import Options
from rotary_export.serving.ports import Addresses
from rotary_export.serving.ray.reaper import start_reaper
from rotary_export.serving.size_limits import find_largest_body
from rotary_export.types import Progress

# Read when Ray is imported. The first keeps Ray's own sockets on the loopback interface (on Linux
# too, in spite of its name). A new token for each start authenticates what they accept.
os.environ.update(
    RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER="0",
    RAY_AUTH_MODE="token",
    RAY_AUTH_TOKEN=secrets.token_hex(32),
    RAY_USAGE_STATS_ENABLED="0",
)

try:
    import grpc
    import ray
    from ray import serve as ray_serve
    from ray.serve.exceptions import RayServeException

    from rotary_export.serving.ray.app import METHODS, add_open_inference, build_app
except ImportError as error:
    raise RotaryExportError(describe_missing("serve --engine ray", error.name, "ray")) from None

APPLICATION = "rotary_export"
OBJECT_STORE_BYTES = 128 << 20
CALLS = 128  # of gRPC at a time
STOP_S = 5  # for calls to end


def serve(options: Options, report_ready: Progress) -> None:
    """Serve as `serving.mlserver.engine.serve`; afterwards, no process of Ray remains."""
    served = options.open()  # raises here, not in a replica
    name = served.metadata["name"]
    largest = find_largest_body(served.largest_request, options.max_request_mib)
    addresses = options.find_addresses()
    args = {
        "bundle_dir": str(options.bundle.absolute()),
        "max_request_mib": options.max_request_mib,
        **options.to_arguments(),
    }
    for logger in ("ray", "ray.serve"):
        logging.getLogger(logger).setLevel(logging.WARNING)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _interrupt)
    folder = tempfile.mkdtemp(prefix="ray-")  # a short path: it contains sockets
    server = None
    # SystemExit: Ray's own handler of SIGTERM raises it during the start.
    with start_reaper(folder), suppress(KeyboardInterrupt, SystemExit):
        try:
            ray.init(
                address="local",
                num_cpus=options.replicas,
                include_dashboard=False,
                object_store_memory=OBJECT_STORE_BYTES,
                log_to_driver=False,
                logging_level=logging.WARNING,
                **make_settings(folder, addresses.metrics_port),
            )
            signal.signal(signal.SIGTERM, _interrupt)  # Ray has set its own
            ray_serve.start(
                proxy_location="HeadOnly",
                http_options={"host": addresses.host, "port": addresses.http_port},
            )
            app = build_app(args, options.replicas)
            handle = ray_serve.run(app, name=APPLICATION, route_prefix="/")
            kernel_path = handle.get_kernel_path.remote().result()
            server = _start_grpc(handle, addresses, largest)
            replicas = "1 replica" if options.replicas == 1 else f"{options.replicas} replicas"
            state = f"{kernel_path}, {replicas}"
            report_ready(addresses.describe(name, state, metrics_host="127.0.0.1"))
            threading.Event().wait()  # for a signal
        finally:
            if server is not None:
                server.stop(STOP_S).wait()
                ray_serve.delete(APPLICATION)  # replicas complete their requests
            ray.shutdown()


def _interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


def _start_grpc(handle: Any, addresses: Addresses, largest: int) -> Any:
    """Start a gRPC server that forwards calls to replicas.

    Ray's own gRPC proxy always listens on every interface.
    """
    server = grpc.server(
        ThreadPoolExecutor(CALLS),
        options=[
            ("grpc.max_receive_message_length", largest),
            ("grpc.max_send_message_length", -1),
            ("grpc.so_reuseport", 0),
        ],
    )
    add_open_inference(_Front(handle), server)
    server.add_insecure_port(f"{addresses.url_host}:{addresses.grpc_port}")
    server.start()
    return server


class _Front:
    """Forwards the calls of the protocol's service to replicas."""

    def __init__(self, handle: Any) -> None:
        for name in METHODS:
            setattr(self, name, _make_call(handle, name))


def _make_call(handle: Any, name: str) -> Callable[[bytes, Any], bytes]:
    def call(request: bytes, context: Any) -> bytes:
        try:
            answer, code, details = handle.answer_bytes.remote(name, request).result()
        except ray.exceptions.RayTaskError as error:  # a bug
            answer, code, details = b"", grpc.StatusCode.INTERNAL, str(error.cause)
        except (ray.exceptions.RayError, RayServeException) as error:  # its replica died
            answer, code, details = b"", grpc.StatusCode.UNAVAILABLE, type(error).__name__
        context.set_code(code)
        context.set_details(details)
        return bytes(answer)

    return call
