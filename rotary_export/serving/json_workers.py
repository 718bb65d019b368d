"""Large JSON is read and written in worker processes; small requests do not wait for it.

anyio's processes import the script that started the server. That of a replica of Ray can't be
imported, so that a thread does the same there. Numbers pass through files: a pipe would take the
event loop once for each 64 KiB.
"""

from __future__ import annotations

import asyncio
import functools
import os
import pickle
import signal
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import IO, Any

from anyio import BrokenWorkerProcess, CapacityLimiter, to_process

from rotary_export.compat.glibc import return_memory
from rotary_export.serving.interface import Interface
from rotary_export.serving.messages import InferCall, RefusedError, read_http, write_http
from rotary_export.types import Arrays

SMALL_BODY = 32 << 10  # bytes; read on the event loop, in less than a millisecond
SMALL_ANSWER = 4 << 10  # numbers
PREFIX = "rotary_export-"  # of the files
WORK_S = 60  # of one call; its process is killed then
_PART = 1 << 20  # bytes of an answer that are sent at once


class JsonWorkers:
    """Reads and writes the messages of HTTP; of an event loop.

    Args:
        interface: Of the model.
        count: Of the processes; 0: a thread of this process reads.
    """

    def __init__(self, interface: Interface, count: int) -> None:
        self._interface = interface
        self._count = count
        self._limiter: CapacityLimiter | None = None

    async def start(self) -> None:
        """Start the processes, which the first large requests would wait for."""
        await asyncio.gather(*(self._call(_prepare) for _ in range(self._count)))

    async def read(self, body: IO[bytes], header_length: str | None) -> InferCall:
        """Read a body.

        Args:
            body: A file at its end; it has a name if it has more than SMALL_BODY bytes.
            header_length: As `read_http`.

        Raises:
            RotaryExportError: As `read_http`.
            RefusedError: Its process has ended, or took too long.
        """
        size = body.tell()
        if header_length is not None and header_length.isdecimal():
            size = min(size, int(header_length))
        body.seek(0)
        if size <= SMALL_BODY:
            return read_http(self._interface, body.read(), header_length)
        await self._call(_read, self._interface, body.name, header_length)
        call: InferCall = pickle.load(body)
        return call

    async def write(
        self, call: InferCall, outputs: Arrays
    ) -> tuple[bytes | AsyncIterator[bytes], dict[str, str]]:
        """Write an answer; raises as `write_http`, and as `read`.

        Returns:
            The body or, if it is large, its parts; and the headers.
        """
        call = InferCall({}, call.outputs, call.binary, call.id)
        wanted = {name: outputs[name] for name in call.outputs or outputs}
        in_json = [wanted[name] for name in wanted if not call.outputs.get(name, call.binary)]
        if sum(value.size for value in in_json) <= SMALL_ANSWER:
            return write_http(self._interface, call, wanted)
        file = NamedTemporaryFile(prefix=PREFIX)
        try:
            pickle.dump(wanted, file, pickle.HIGHEST_PROTOCOL)
            file.flush()
            headers = await self._call(_write, self._interface, call, file.name)
            headers["Content-Length"] = str(file.seek(0, os.SEEK_END))
        except BaseException:
            file.close()
            raise
        return _iterate_parts(file), headers

    async def _call(self, function: Callable[..., Any], *args: Any) -> Any:
        if not self._count:
            return await asyncio.to_thread(function, *args)
        if self._limiter is None:
            self._limiter = CapacityLimiter(self._count)
        try:
            async with asyncio.timeout(WORK_S):
                return await to_process.run_sync(
                    _work, function, *args, cancellable=True, limiter=self._limiter
                )
        except TimeoutError:
            raise RefusedError(503, f"the request took more than {WORK_S} s to read") from None
        except BrokenWorkerProcess:
            raise RefusedError(503, "the process that reads large requests has ended") from None


async def _iterate_parts(file: IO[bytes]) -> AsyncIterator[bytes]:
    with file:
        file.seek(0)
        while part := file.read(_PART):
            yield part


@functools.cache
def _prepare() -> None:
    """Prepare a worker process: Ctrl-C is for its server."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _work(function: Callable[..., Any], *args: Any) -> Any:
    _prepare()
    return function(*args)


def _read(interface: Interface, name: str, header_length: str | None) -> None:
    """Read a body; its file then contains the request."""
    path = Path(name)
    call = read_http(interface, path.read_bytes(), header_length)
    with path.open("wb") as file:
        pickle.dump(call, file, pickle.HIGHEST_PROTOCOL)
    return_memory()


def _write(interface: Interface, call: InferCall, name: str) -> dict[str, str]:
    """Write an answer to the file that contains the outputs; return the headers."""
    path = Path(name)
    body, headers = write_http(interface, call, pickle.loads(path.read_bytes()))
    path.write_bytes(body)
    return_memory()
    return headers
