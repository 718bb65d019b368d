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

from rotary_export.errors import RotaryExportError
from rotary_export.serving.options import Options
from rotary_export.serving.ports import find_ports
from rotary_export.serving.ray.reaper import start_reaper

# Read when Ray is imported. With the first, Ray's own sockets stay on the loopback interface (the
# name notwithstanding, on Linux too); what they take must carry a token, new for each start.
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
    raise RotaryExportError(
        f"serve --engine ray needs {error.name}: pip install 'rotary_export[ray]'"
    ) from None

APPLICATION = "rotary_export"
OBJECT_STORE_BYTES = 128 << 20
CALLS = 128  # of gRPC at a time
STOP_S = 5  # that calls get to end


def serve(options: Options, say: Callable[[str], None]) -> None:
    """Serve a bundle until SIGTERM or SIGINT; nothing of Ray is left running.

    Args:
        options: What to serve, and where.
        say: Called with one line, once the server answers.

    Raises:
        RotaryExportError: The bundle can't be served, or a port is taken.
    """
    served = options.open()  # what is wrong with the bundle is said here, not by a replica
    name = served.metadata["name"]
    http_port, grpc_port, metrics_port = find_ports(
        options.host, options.http_port, options.grpc_port, options.metrics_port
    )
    args = {
        "bundle_dir": str(options.bundle.absolute()),
        "graph": options.graph,
        "runtime": options.runtime,
        "allow_torchscript": options.allow_torchscript,
        "max_batch_size": options.max_batch_size,
        "max_batch_delay_ms": options.max_batch_delay_ms,
        "name": options.name,
        "max_request_mib": options.max_request_mib,
    }
    del served
    for logger in ("ray", "ray.serve"):
        logging.getLogger(logger).setLevel(logging.WARNING)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _interrupt)
    folder = tempfile.mkdtemp(prefix="ray-")  # short: it holds sockets
    server = None
    # SystemExit: of Ray's own handler of SIGTERM, while it starts.
    with start_reaper(folder), suppress(KeyboardInterrupt, SystemExit):
        try:
            ray.init(
                address="local",
                num_cpus=options.replicas,
                include_dashboard=False,
                object_store_memory=OBJECT_STORE_BYTES,
                log_to_driver=False,
                logging_level=logging.WARNING,
                _metrics_export_port=metrics_port,
                _temp_dir=folder,
            )
            signal.signal(signal.SIGTERM, _interrupt)  # Ray has set its own
            ray_serve.start(
                proxy_location="HeadOnly", http_options={"host": options.host, "port": http_port}
            )
            app = build_app(args, options.replicas)
            handle = ray_serve.run(app, name=APPLICATION, route_prefix="/")
            kernel_path = handle.get_kernel_path.remote().result()
            host = f"[{options.host}]" if ":" in options.host else options.host
            server = _start_grpc(handle, f"{host}:{grpc_port}", options.max_request_mib << 20)
            replicas = "1 replica" if options.replicas == 1 else f"{options.replicas} replicas"
            say(
                f"serving {name} ({kernel_path}, {replicas}) on http://{host}:{http_port}, "
                f"grpc://{host}:{grpc_port}, metrics http://127.0.0.1:{metrics_port}/metrics"
            )
            threading.Event().wait()  # for a signal
        finally:
            if server is not None:
                server.stop(STOP_S).wait()
                ray_serve.delete(APPLICATION)  # replicas end what they have begun
            ray.shutdown()


def _interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


def _start_grpc(handle: Any, address: str, largest: int) -> Any:
    """Start a gRPC server that hands calls to replicas.

    Ray's own gRPC proxy can't be told what address to listen on: it is on every interface.
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
    server.add_insecure_port(address)
    server.start()
    return server


class _Front:
    """Hands the calls of the protocol's service to replicas."""

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
