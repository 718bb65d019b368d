"""Inference over HTTP, the same for every engine: the body's limits, its reading, the answer."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import ExitStack, asynccontextmanager
from io import BytesIO
from tempfile import NamedTemporaryFile
from typing import IO, Any

from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from rotary_export.errors import RotaryExportError
from rotary_export.serving.interface import Interface
from rotary_export.serving.json_workers import PREFIX, SMALL_BODY, JsonWorkers
from rotary_export.serving.messages import HEADER_LENGTH, RefusedError
from rotary_export.types import Array

HELD_BYTES = 512 << 20  # of bodies at a time
READ_S = 10  # for the first part of a body; then it must keep up this rate:
READ_RATE = 64 << 10  # bytes per second

Run = Callable[[dict[str, Array]], Awaitable[dict[str, Array]]]


class HttpInfer:
    """Answers inference requests over HTTP; of an event loop.

    Args:
        interface: Of the model.
        largest_body: As the attribute.
        workers: Number of processes that read and write large JSON; 0: a thread does.

    Attributes:
        interface: Of the model.
        largest_body: In bytes; a larger body is refused, unread where its length is announced.
        workers: Read and write large JSON.
    """

    def __init__(self, interface: Interface, largest_body: int, workers: int = 0) -> None:
        self.largest_body = largest_body
        self._held = 0
        self.interface = interface
        self.workers = JsonWorkers(interface, workers)

    async def answer(self, request: Request, run: Run) -> Response:
        """Answer a request.

        Args:
            request: Its body is not read yet.
            run: Runs the model.

        Raises:
            RotaryExportError: As `JsonWorkers.read` and `run`.
            RefusedError: The body must not be read, or did not arrive.
        """
        self._check_headers(request.headers)
        async with self._read(request) as body:
            call = await self.workers.read(body, request.headers.get(HEADER_LENGTH))
        content, headers = await self.workers.write(call, await run(call.inputs))
        if isinstance(content, bytes):
            return Response(content, headers=headers)
        return StreamingResponse(content, headers=headers)

    def _check_headers(self, headers: Any) -> None:
        length = headers.get("content-length", "0")
        if not length.isdecimal() or int(length) > self.largest_body:
            raise RefusedError(413, f"the body must be <= {self.largest_body} bytes, got {length}")
        if headers.get("content-encoding", "identity") != "identity":
            raise RefusedError(415, "the body must not be compressed")

    @asynccontextmanager
    async def _read(self, request: Request) -> AsyncIterator[IO[bytes]]:
        """Read the body to a file, which is in memory if it is small."""
        size = 0
        start = asyncio.get_running_loop().time()
        with ExitStack() as stack:
            stack.callback(lambda: self._release(size))
            file: IO[bytes] = BytesIO()
            try:
                async with asyncio.timeout(READ_S) as deadline:
                    async for part in request.stream():
                        size += len(part)
                        self._held += len(part)
                        self._check_size(size)
                        if size > SMALL_BODY and isinstance(file, BytesIO):
                            beginning = file.getvalue()
                            file = stack.enter_context(NamedTemporaryFile(prefix=PREFIX))
                            file.write(beginning)
                        file.write(part)
                        deadline.reschedule(start + READ_S + size / READ_RATE)
                file.flush()
            except TimeoutError:
                raise RefusedError(
                    408,
                    f"the body must arrive within {READ_S} s, or at {READ_RATE} bytes per second, "
                    f"got {size} bytes",
                ) from None
            except ClientDisconnect:
                raise RefusedError(400, "the client has disconnected") from None
            except OSError as error:
                raise RefusedError(503, f"the body can't be stored: {error.strerror}") from None
            yield file

    def _release(self, size: int) -> None:
        self._held -= size

    def _check_size(self, size: int) -> None:
        if size > self.largest_body:
            raise RefusedError(413, f"the body must be <= {self.largest_body} bytes")
        if self._held > max(HELD_BYTES, self.largest_body):
            raise RefusedError(503, "the server has too many large requests; try again later")


def make_error(error: RotaryExportError) -> Response:
    """Return the answer to a request that failed."""
    status = error.status if isinstance(error, RefusedError) else 400
    # A body that was not read must not be parsed as the next request.
    headers = {"Connection": "close"} if status in (408, 413, 415, 503) else None
    return JSONResponse({"error": str(error)}, status, headers)
