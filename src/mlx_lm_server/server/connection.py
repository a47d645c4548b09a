"""HTTP connections that cannot be held open by doing nothing.

uvicorn has no limit on the time in which a request's head must arrive, on its size (with
httptools), or on the time in which a client must take what was written. Here each has one; at its
end only that connection is closed. How long a body may take is BodyLimit's affair; the limit here
is the one for clients that go on sending after they were answered.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from functools import partial
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

TIMEOUT_RESPONSE = b"HTTP/1.1 408 Request Timeout\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"
HEAD_TOO_LARGE_RESPONSE = (
    b"HTTP/1.1 431 Request Header Fields Too Large\r\n"
    b"content-length: 0\r\nconnection: close\r\n\r\n"
)


@dataclass(frozen=True)
class ConnectionLimits:
    head_s: float = 10.0
    body_s: float = 30.0
    discarded_body_s: float = 60.0
    write_s: float = 60.0
    max_head_bytes: int = 65536


class BoundedProtocol(HttpToolsProtocol):
    """One connection; timers run on its event loop."""

    def __init__(self, limits: ConnectionLimits, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._limits = limits
        self._read_timer: asyncio.TimerHandle | None = None
        self._write_timer: asyncio.TimerHandle | None = None
        self._is_in_head = True
        self._has_begun = False
        self._num_head_bytes = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._set_read_timer(None)
        self.resume_writing()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._is_in_head:
            self._num_head_bytes += len(data)
            # A body may have come with the head; only a head that is still open is too large.
        super().data_received(data)
        if self._is_in_head and self._num_head_bytes > self._limits.max_head_bytes:
            self._end(HEAD_TOO_LARGE_RESPONSE)

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._has_begun = True
        if self._read_timer is None:
            self._await_head()

    def on_headers_complete(self) -> None:
        self._is_in_head = False
        self._set_read_timer(self._limits.discarded_body_s)
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        self._set_read_timer(None)
        self._is_in_head = True
        self._has_begun = False
        self._num_head_bytes = 0
        super().on_message_complete()

    def pause_writing(self) -> None:
        super().pause_writing()
        if self._write_timer is None:
            self._write_timer = self.loop.call_later(self._limits.write_s, self._give_up_writing)

    def resume_writing(self) -> None:
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None
        super().resume_writing()

    def _await_head(self) -> None:
        self._is_in_head = True
        self._set_read_timer(self._limits.head_s)

    def _set_read_timer(self, limit_s: float | None) -> None:
        if self._read_timer is not None:
            self._read_timer.cancel()
            self._read_timer = None
        if limit_s is not None:
            self._read_timer = self.loop.call_later(limit_s, self._give_up_reading)

    def _give_up_reading(self) -> None:
        self._read_timer = None
        self._end(TIMEOUT_RESPONSE if self._has_begun and self._is_in_head else b"")

    def _give_up_writing(self) -> None:
        self._write_timer = None
        self.transport.abort()

    def _end(self, response: bytes) -> None:
        """Closes at once; a response only where none is under way."""
        if self.transport.is_closing():
            return
        is_idle = self.cycle is None or self.cycle.response_complete
        if response and is_idle:
            self.transport.write(response)
            self.transport.close()
        else:
            self.transport.abort()


def bounded_protocol(limits: ConnectionLimits) -> Any:
    """For uvicorn's `http` setting."""
    return partial(BoundedProtocol, limits)
