"""MLServer's gRPC service, with inference on raw numbers: MLServer makes lists of them."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
from mlserver.errors import InferenceError
from mlserver.grpc.dataplane_pb2 import ModelInferResponse
from mlserver.grpc.servicers import InferenceServicer
from mlserver.grpc.utils import handle_mlserver_error

from rotary_export.compat.mlserver import open_call
from rotary_export.errors import RotaryExportError
from rotary_export.serving.interface import Interface
from rotary_export.serving.messages import read_grpc, write_grpc

_SMALL = 64 << 10  # bytes of a message that is read on the event loop


def make_service(server: Any, interface: Interface) -> type[Any]:
    """Return the class of the service.

    Args:
        server: An `mlserver.MLServer`.
        interface: Of its model.
    """

    class Service(InferenceServicer):  # type: ignore[misc]  # mlserver has no types
        @handle_mlserver_error  # type: ignore[untyped-decorator]
        async def ModelInfer(self, request: Any, context: Any) -> Any:  # noqa: N802
            try:
                if request.raw_input_contents or request.ByteSize() <= _SMALL:
                    call = read_grpc(interface, request)
                else:
                    call = await asyncio.to_thread(read_grpc, interface, request)
                name, version = request.model_name, request.model_version or None
                async with open_call(server, name, version) as model:
                    outputs = await model.run(call.inputs)
            except RotaryExportError as error:
                raise InferenceError(str(error)) from None
            return write_grpc(interface, call, outputs, ModelInferResponse)

        async def ModelStreamInfer(self, requests: Any, context: Any) -> Any:  # noqa: N802
            await context.abort(grpc.StatusCode.UNIMPLEMENTED, "there are no streams here")
            yield

    return Service
