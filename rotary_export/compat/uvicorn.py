"""uvicorn: the protocol of a connection, with limits that uvicorn lacks."""

from __future__ import annotations

from typing import Any


def make_limited_protocol(most: int, silent_s: float) -> type[Any]:
    """Return a protocol for `uvicorn.Config(http=...)`, of one server.

    Where there are too many connections, the one that has waited longest for its client is closed.

    Args:
        most: Connections at a time.
        silent_s: Seconds in which the head of a request must arrive, or the next part of its body,
            and in which the client must read a part of the answer.
    """
    from uvicorn.protocols.http.auto import AutoHTTPProtocol

    waiting: dict[Any, None] = {}  # connections that wait for their client, the oldest first

    class LimitedProtocol(AutoHTTPProtocol):  # type: ignore[misc]
        _read_alarm: Any = None
        _write_alarm: Any = None

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            if len(self.connections) > most:
                next(iter(waiting), self).transport.abort()
            self._watch()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            if self.cycle is not None and not self.cycle.response_complete:
                self._stop_watching()  # to start anew: a part of a body
            self._watch()

        def on_response_complete(self) -> None:
            super().on_response_complete()
            self._watch()

        def connection_lost(self, error: Exception | None) -> None:
            super().connection_lost(error)
            self._stop_watching()
            self._stop_write_alarm()

        def pause_writing(self) -> None:
            super().pause_writing()
            self._check_progress(None)

        def resume_writing(self) -> None:
            super().resume_writing()
            self._stop_write_alarm()

        def _watch(self) -> None:
            done = self.cycle is None or self.cycle.response_complete
            if not (done or self.cycle.more_body):
                self._stop_watching()
            elif self not in waiting and not self.transport.is_closing():
                waiting[self] = None
                self._read_alarm = self.loop.call_later(silent_s, self.transport.abort)

        def _stop_watching(self) -> None:
            if self in waiting:
                del waiting[self]
                self._read_alarm.cancel()

        def _check_progress(self, before: int | None) -> None:
            unread = self.transport.get_write_buffer_size()
            if before is not None and unread >= before:
                self.transport.abort()
            else:
                self._write_alarm = self.loop.call_later(silent_s, self._check_progress, unread)

        def _stop_write_alarm(self) -> None:
            if self._write_alarm is not None:
                self._write_alarm.cancel()

    return LimitedProtocol
