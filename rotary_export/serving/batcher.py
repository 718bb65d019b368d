"""Adaptive batching: requests that arrive during a run, or within a delay, run together."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from contextlib import suppress

from rotary_export.serving.core import ServedModel
from rotary_export.types import Array, Arrays


class Batcher:
    """Runs the waiting requests together, in one thread.

    Args:
        served: The model.
        on_batch: Called with the number of requests of each batch.
        delay: Longest time in seconds that a request waits to be batched while the model is idle.
    """

    def __init__(
        self, served: ServedModel, on_batch: Callable[[int], None], delay: float = 0.0
    ) -> None:
        self._served = served
        self._delay = delay
        self._on_batch = on_batch
        self._waiting: list[tuple[Arrays, asyncio.Future[dict[str, Array]]]] = []
        self._full = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    async def run(self, inputs: Arrays) -> dict[str, Array]:
        """Run one request.

        Raises:
            RotaryExportError: The request is invalid.
        """
        future: asyncio.Future[dict[str, Array]] = asyncio.get_running_loop().create_future()
        self._waiting.append((inputs, future))
        if len(self._waiting) >= self._served.max_batch_size:
            self._full.set()
        if self._task is None:
            self._task = asyncio.create_task(self._work())
        return await future

    async def _work(self) -> None:
        try:
            while self._waiting:
                if self._delay:
                    with suppress(TimeoutError):
                        await asyncio.wait_for(self._full.wait(), self._delay)
                size = self._served.max_batch_size
                batch, self._waiting = self._waiting[:size], self._waiting[size:]
                if len(self._waiting) < size:
                    self._full.clear()
                self._on_batch(len(batch))
                requests = [inputs for inputs, _ in batch]
                results: Sequence[dict[str, Array] | Exception]
                try:
                    results = await asyncio.to_thread(self._served.run_many, requests)
                except Exception as error:  # a bug; every waiting request gets it
                    results = [error] * len(batch)
                for (_, future), result in zip(batch, results, strict=True):
                    if future.done():  # its client has disconnected
                        continue
                    if isinstance(result, Exception):
                        future.set_exception(result)
                    else:
                        future.set_result(result)
        finally:
            self._task = None
