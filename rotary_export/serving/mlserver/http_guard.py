"""Checks requests before FastAPI reads them; errors have the form of the protocol."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse


def add_guards(app: FastAPI, limit: int) -> None:
    """Make every error {"error": ...}, and refuse bodies that must not be read.

    Args:
        app: Not started yet.
        limit: Largest number of bytes of a body.
    """
    app.add_exception_handler(RequestValidationError, _answer_invalid)
    app.add_exception_handler(HTTPException, _answer_refused)
    app.add_middleware(BodyGuard, limit=limit)


async def _answer_invalid(_: Any, error: Any) -> JSONResponse:
    first = error.errors()[0]  # without the input, which may be megabytes
    where = ".".join(str(part) for part in first["loc"])
    return _make_error(400, f"the request is malformed: {where}: {first['msg']}")


async def _answer_refused(_: Any, error: Any) -> JSONResponse:
    return _make_error(error.status_code, error.detail)


def _make_error(status: int, message: str) -> JSONResponse:
    return JSONResponse({"error": message}, status)


class BodyGuard:
    """Refuses a body that is too large, compressed or binary, unread; ASGI middleware.

    Any other is JSON, whatever its content type: `curl -d` names a form.

    Args:
        app: The next application.
        limit: Largest number of bytes.
    """

    def __init__(self, app: Any, limit: int) -> None:
        self._app = app
        self._limit = limit

    async def __call__(self, scope: Any, receive: Callable[[], Awaitable[Any]], send: Any) -> None:
        """Answer one request."""
        refusal = self._check_headers(dict(scope.get("headers", ())))
        if refusal is not None:
            refusal.headers["connection"] = "close"  # the bytes that follow are not a request
            await refusal(scope, receive, send)
            return
        if "headers" in scope:
            others = [header for header in scope["headers"] if header[0] != b"content-type"]
            scope = {**scope, "headers": [*others, (b"content-type", b"application/json")]}
        received = 0

        async def count() -> Any:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self._limit:
                raise HTTPException(413, self._too_large)
            return message

        await self._app(scope, count, send)

    @property
    def _too_large(self) -> str:
        return f"the body must be <= {self._limit} bytes"

    def _check_headers(self, headers: dict[bytes, bytes]) -> JSONResponse | None:
        length = headers.get(b"content-length", b"0")
        if not length.isdigit() or int(length) > self._limit:
            return _make_error(413, f"{self._too_large}, got {length.decode('latin-1')}")
        if b"inference-header-content-length" in headers:
            return _make_error(
                415, "tensors must be JSON, not binary (tritonclient: binary_data=False); or gRPC"
            )
        if headers.get(b"content-encoding", b"identity") != b"identity":
            return _make_error(415, "the body must not be compressed")
        return None
