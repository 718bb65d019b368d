"""A bundle as an application of Ray Serve: HTTP and gRPC requests, run in batches by replicas.

`rotary-export serve --engine ray` starts it on one machine. On a cluster, a config file starts it
through `build_app`: see the kit that `rotary-export deploy ray` writes.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import grpc
from google.protobuf.message import DecodeError
from ray import serve
from ray.util.metrics import Gauge, Histogram
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from tritonclient.grpc import service_pb2 as pb

from rotary_export.errors import RotaryExportError
from rotary_export.package import __version__
from rotary_export.serving.http import HttpInfer, make_error
from rotary_export.serving.messages import EXTENSIONS, RefusedError, read_grpc, write_grpc
from rotary_export.serving.metrics import BUCKETS, KERNEL_PATH, REQUESTS_TOGETHER
from rotary_export.serving.options import ModelOptions
from rotary_export.serving.size_limits import find_largest_body

SERVER = {"name": "rotary_export", "version": __version__}
CODES = {404: grpc.StatusCode.NOT_FOUND}  # of gRPC, for those of HTTP
ONGOING = 256  # requests in a replica at a time, so that they can run together


class OpenInference:
    """One replica: the model, and the Open Inference Protocol around it.

    Args:
        bundle_dir: The bundle's folder, on the replica's machine.
        max_request_mib: Largest body of a request over HTTP; None: as `find_largest_body`.
        **options: As `ModelOptions`.
    """

    def __init__(
        self,
        bundle_dir: str,
        max_request_mib: int | None = None,
        **options: Any,
    ) -> None:
        model_options = ModelOptions(**options)
        self._served = model_options.open_bundle(bundle_dir)
        largest = find_largest_body(self._served.largest_request, max_request_mib)
        self._http = HttpInfer(self._served.interface, largest)
        labels = {
            "model": self._served.metadata["name"],
            "kernel_path": self._served.kernel_path,
        }
        # Kept, or Ray would drop it. Ray prefixes the names with ray_.
        self._gauge = Gauge(*KERNEL_PATH, tag_keys=tuple(labels))
        self._gauge.set(1, tags=labels)
        together = Histogram(*REQUESTS_TOGETHER, boundaries=list(BUCKETS))
        self._batcher = model_options.make_batcher(self._served, together.observe)

    async def __call__(self, request: Request) -> Response:
        """Answer an HTTP request."""
        try:
            return await self._route(request)
        except RotaryExportError as error:
            return make_error(error)

    async def _route(self, request: Request) -> Response:
        match request.method, request.url.path.strip("/").split("/"):
            case "GET", ["v2"]:
                return JSONResponse({**SERVER, "extensions": EXTENSIONS})
            case "GET", ["v2", "health", "live" | "ready"]:
                return Response()
            case "GET", ["v2", "models", name, *rest] if rest in ([], ["versions", "1"]):
                self._check_name(name)
                return JSONResponse(self._served.metadata)
            case "GET", ["v2", "models", name, *rest] if _is_call(rest, "ready"):
                self._check_name(name)
                return Response()
            case "POST", ["v2", "models", name, *rest] if _is_call(rest, "infer"):
                self._check_name(name)
                return await self._http.answer(request, self._batcher.run)
        raise RefusedError(404, f"{request.method} {request.url.path} is not part of the protocol")

    async def answer(self, method: str, request: bytes) -> tuple[Any, grpc.StatusCode, str]:
        """Answer a call of the protocol's gRPC service.

        Args:
            method: Its name.
            request: Its message.

        Returns:
            The answer (empty if it failed), the status and the error's message.
        """
        parse, respond, empty = METHODS[method]
        try:
            return await respond(self, parse(request)), grpc.StatusCode.OK, ""
        except RefusedError as error:
            return empty(), CODES[error.status], str(error)
        except RotaryExportError as error:
            return empty(), grpc.StatusCode.INVALID_ARGUMENT, str(error)
        except DecodeError:
            return empty(), grpc.StatusCode.INVALID_ARGUMENT, f"{method} must contain its message"

    async def answer_bytes(self, method: str, request: bytes) -> tuple[bytes, grpc.StatusCode, str]:
        """Answer as `answer`, with bytes: a message of tritonclient's can't be pickled."""
        answer, code, details = await self.answer(method, request)
        return answer.SerializeToString(), code, details

    async def _infer_grpc(self, request: Any) -> Any:
        self._check_name(request.model_name, request.model_version)
        interface = self._served.interface
        call = await asyncio.to_thread(read_grpc, interface, request)
        outputs = await self._batcher.run(call.inputs)
        return write_grpc(interface, call, outputs, pb.ModelInferResponse)

    async def _describe_model(self, request: Any) -> Any:
        self._check_name(request.name, request.version)
        return pb.ModelMetadataResponse(**self._served.metadata)

    async def _describe_server(self, _: Any) -> Any:
        return pb.ServerMetadataResponse(**SERVER, extensions=EXTENSIONS)

    async def _report_live(self, _: Any) -> Any:
        return pb.ServerLiveResponse(live=True)

    async def _report_ready(self, _: Any) -> Any:
        return pb.ServerReadyResponse(ready=True)

    async def _report_model_ready(self, request: Any) -> Any:
        self._check_name(request.name, request.version)
        return pb.ModelReadyResponse(ready=True)

    def get_kernel_path(self) -> str:
        """Return the kernel path: what computes the rotary nodes."""
        return self._served.kernel_path

    def _check_name(self, name: str, version: str = "") -> None:
        known = self._served.metadata
        if name != known["name"] or version not in ("", *known["versions"]):
            version = version and f" version {version}"
            raise RefusedError(
                404,
                f"the model {name!r}{version} does not exist; this server has {known['name']!r} "
                f"version {', '.join(known['versions'])}",
            )


# The protocol's gRPC methods: the parser of each, its handler, and the answer to a failed call.
METHODS: dict[str, tuple[Callable[[bytes], Any], Callable[..., Any], Callable[[], Any]]] = {
    name: (getattr(pb, f"{name}Request").FromString, respond, getattr(pb, f"{name}Response"))
    for name, respond in {
        "ServerLive": OpenInference._report_live,
        "ServerReady": OpenInference._report_ready,
        "ModelReady": OpenInference._report_model_ready,
        "ServerMetadata": OpenInference._describe_server,
        "ModelMetadata": OpenInference._describe_model,
        "ModelInfer": OpenInference._infer_grpc,
    }.items()
}


def add_open_inference(servicer: Any, server: Any) -> None:
    """Add the protocol's service to a gRPC server; a config file names it for Ray's own proxy.

    Messages stay bytes until a replica reads them.
    """
    methods = {
        name: grpc.unary_unary_rpc_method_handler(getattr(servicer, name)) for name in METHODS
    }
    handler = grpc.method_handlers_generic_handler("inference.GRPCInferenceService", methods)
    server.add_generic_rpc_handlers((handler,))


def build_app(args: Mapping[str, Any], num_replicas: int = 1) -> serve.Application:
    """Return the application, for `serve.run` or a config file.

    Args:
        args: `bundle_dir`, and other arguments of `OpenInference`.
        num_replicas: A config file overrides it.
    """
    deployment = serve.deployment(
        OpenInference,
        max_ongoing_requests=ONGOING,
        ray_actor_options={"num_cpus": 1},
        health_check_period_s=2,
        graceful_shutdown_timeout_s=5,
        graceful_shutdown_wait_loop_s=0.2,
    )
    return deployment.options(num_replicas=num_replicas).bind(**args)


def _make_proxy_method(name: str) -> Callable[[OpenInference, Any, Any], Awaitable[Any]]:
    """Make the method that Ray's own gRPC proxy finds by the name of a call."""

    async def call(self: OpenInference, request: bytes, grpc_context: Any) -> Any:
        answer, code, details = await self.answer(name, request)
        if code is not grpc.StatusCode.OK:
            grpc_context.set_code(code)
            grpc_context.set_details(details)
        return answer

    return call


for _name in METHODS:
    setattr(OpenInference, _name, _make_proxy_method(_name))


def _is_call(path: list[str], call: str) -> bool:
    return path in ([call], ["versions", "1", call])
