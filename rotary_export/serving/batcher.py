"""Adaptive batching: while one run is on, or for a moment that is asked for, requests gather."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from contextlib import suppress

from rotary_export.serving.core import Array, Arrays, ServedModel


class Batcher:
    """Runs what waits together, in one thread.

    Args:
        served: What runs it.
        on_take: Called with how many requests were taken together.
        delay: Seconds that a request waits for company, at most, where no run is on.
    """

    def __init__(
        self, served: ServedModel, on_take: Callable[[int], None], delay: float = 0.0
    ) -> None:
        self._served = served
        self._delay = delay
        self._on_take = on_take
        self._waiting: list[tuple[Arrays, asyncio.Future[dict[str, Array]]]] = []
        self._full = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    async def run(self, inputs: Arrays) -> dict[str, Array]:
        """Run one request.

        Raises:
            RotaryExportError: What is wrong with it.
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
                taken, self._waiting = self._waiting[:size], self._waiting[size:]
                if len(self._waiting) < size:
                    self._full.clear()
                self._on_take(len(taken))
                requests = [inputs for inputs, _ in taken]
                results: Sequence[dict[str, Array] | Exception]
                try:
                    results = await asyncio.to_thread(self._served.run_many, requests)
                except Exception as error:  # whoever waits must hear of a bug, too
                    results = [error] * len(taken)
                for (_, future), result in zip(taken, results, strict=True):
                    if future.done():  # its client has left
                        continue
                    if isinstance(result, Exception):
                        future.set_exception(result)
                    else:
                        future.set_result(result)
        finally:
            self._task = None
