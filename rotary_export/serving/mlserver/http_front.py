"""HTTP in front of MLServer's application: it answers inference, and limits every other body.

MLServer reads a body on its event loop, and validates each number twice.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable
from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from mlserver.errors import MLServerError
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from rotary_export.compat.mlserver import open_call
from rotary_export.errors import RotaryExportError
from rotary_export.serving.http import HttpInfer, make_error
from rotary_export.serving.messages import RefusedError
from rotary_export.types import Array

OTHER_BODY = 64 << 10  # largest number of bytes; those of MLServer's repository are names
_INFER = re.compile(r"/v2/models/([^/]+)(?:/versions/([^/]+))?/(?:infer|generate)")


def add_front(app: FastAPI, server: Any, infer: HttpInfer) -> None:
    """Answer inference in front of an application, and make every error {"error": ...}.

    Args:
        app: Of the server; not started yet.
        server: An `mlserver.MLServer`.
        infer: Answers inference.
    """
    app.add_exception_handler(RequestValidationError, _answer_invalid)
    app.add_exception_handler(HTTPException, _answer_refused)
    # Innermost: MLServer's metrics of HTTP see every request.
    app.user_middleware.append(Middleware(HttpFront, server=server, infer=infer))


async def _answer_invalid(_: Any, error: Any) -> Response:
    first = error.errors()[0]  # without the input
    where = ".".join(str(part) for part in first["loc"])
    return make_error(RotaryExportError(f"the request is malformed: {where}: {first['msg']}"))


async def _answer_refused(_: Any, error: Any) -> Response:
    return make_error(RefusedError(error.status_code, error.detail))


class HttpFront:
    """ASGI middleware.

    Args:
        app: The next application.
        server: An `mlserver.MLServer`.
        infer: Answers inference.
    """

    def __init__(self, app: Any, server: Any, infer: HttpInfer) -> None:
        self._app = app
        self._server = server
        self._infer = infer

    async def __call__(self, scope: Any, receive: Callable[[], Awaitable[Any]], send: Any) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request = Request(scope, receive)
        match = _INFER.fullmatch(scope["path"]) if request.method == "POST" else None
        if match is not None:
            await (await self._answer(request, *match.groups()))(scope, receive, send)
        else:
            await self._app(scope, _limit(receive), send)

    async def _answer(self, request: Request, name: str, version: str | None) -> Response:
        async def run(inputs: dict[str, Array]) -> dict[str, Array]:
            async with open_call(self._server, name, version) as model:
                return dict(await model.run(inputs))

        try:
            return await self._infer.answer(request, run)
        except RotaryExportError as error:
            return make_error(error)
        except MLServerError as error:  # there is no such model, or it is not ready
            return JSONResponse({"error": str(error)}, error.status_code)


def _limit(receive: Callable[[], Awaitable[Any]]) -> Callable[[], Awaitable[Any]]:
    """Limit the body that an application receives."""
    received = 0

    async def count() -> Any:
        nonlocal received
        message = await receive()
        received += len(message.get("body", b""))
        if received > OTHER_BODY:
            raise HTTPException(413, f"the body must be <= {OTHER_BODY} bytes")
        return message

    return count
