"""HTTP connections that cannot be held open by doing nothing, and what uvicorn reads otherwise than
RFC 9110 and RFC 9112 have it.

uvicorn has no limit on the time in which a request's head must arrive, on its size (with
httptools), or on the time in which a client must take what was written. Here each has one; at its
end only that connection is closed. How long a body may take is BodyLimit's affair; the limit here
is the one for clients that go on sending after they were answered.

An Upgrade is not done, so the request is answered as if it did not ask for one (RFC 9110, 7.8): the
parser, which takes what follows such a head for another protocol, is replaced by one that is told
the same head without it. An answer to HTTP/1.0 has no chunks (RFC 9112, 6.1).
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

TIMEOUT_RESPONSE = b"HTTP/1.1 408 Request Timeout\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"
HEAD_TOO_LARGE_RESPONSE = (
    b"HTTP/1.1 431 Request Header Fields Too Large\r\n"
    b"content-length: 0\r\nconnection: close\r\n\r\n"
)
# Of the header Connection, when the Upgrade is ignored.
UPGRADE_WORDS = frozenset({b"upgrade", b"http2-settings"})


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
        self._unset_keepalive_if_required()
        self._feed(data)
        if self._is_in_head and self._num_head_bytes > self._limits.max_head_bytes:
            self._end(HEAD_TOO_LARGE_RESPONSE)

    def _feed(self, data: bytes) -> None:
        try:
            while data:
                data = self._rest_after_upgrade(data)
        except httptools.HttpParserError:
            self.logger.warning("Invalid HTTP request received.")
            self.send_400_response("Invalid HTTP request received.")

    def _rest_after_upgrade(self, data: bytes) -> bytes:
        """Parses up to a head that asks for an upgrade; gives that head without it, and what comes
        behind it. Raises HttpParserError."""
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            head = self._head_without_upgrade()
            self.parser = _new_parser(self)
            return head + data[upgrade.args[0] :]
        return b""

    def _head_without_upgrade(self) -> bytes:
        method, version = self.parser.get_method(), self.parser.get_http_version()
        if method == b"CONNECT":
            raise httptools.HttpParserError("this is no proxy")
        lines = [b"%b %b HTTP/%b" % (method, self.url, version.encode())]
        lines += [b"%b: %b" % header for header in _without_upgrade(self.headers)]
        return b"\r\n".join(lines) + b"\r\n\r\n"

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._has_begun = True
        if self._read_timer is None:
            self._await_head()

    def on_headers_complete(self) -> None:
        if self.parser.should_upgrade():
            return
        self._is_in_head = False
        self._set_read_timer(self._limits.discarded_body_s)
        super().on_headers_complete()
        if self.parser.get_http_version() == "1.0":
            self.cycle.waiting_for_100_continue = False
            self.cycle.send = _UnchunkedSend(self.cycle)  # type: ignore[method-assign]

    def on_message_complete(self) -> None:
        if self.parser.should_upgrade():
            return
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


class _UnchunkedSend:
    """`send` of an answer to HTTP/1.0: where the length is not told, the end of the connection is
    the end of the body."""

    def __init__(self, cycle: RequestResponseCycle) -> None:
        self._cycle = cycle
        self._send = cycle.send
        self._ends_with_connection = False

    async def __call__(self, message: Any) -> None:
        if message["type"] == "http.response.start":
            names = {name.lower() for name, _ in message.get("headers", ())}
            self._ends_with_connection = b"content-length" not in names
            if self._ends_with_connection:
                self._cycle.chunked_encoding = False
        elif self._ends_with_connection:
            self._cycle.expected_content_length = len(message.get("body", b""))
        await self._send(message)


def _new_parser(protocol: BoundedProtocol) -> httptools.HttpRequestParser:
    """Returns a parser like uvicorn's own."""
    parser = httptools.HttpRequestParser(protocol)
    with suppress(AttributeError):  # httptools before 0.6.3
        parser.set_dangerous_leniencies(lenient_data_after_close=True)
    return parser


def _without_upgrade(headers: Iterable[tuple[bytes, bytes]]) -> Iterator[tuple[bytes, bytes]]:
    for name, value in headers:
        if name == b"connection":
            words = [word.strip() for word in value.split(b",")]
            kept = b", ".join(word for word in words if word.lower() not in UPGRADE_WORDS)
            if kept:
                yield name, kept
        elif name not in (b"upgrade", b"http2-settings"):
            yield name, value


def bounded_protocol(limits: ConnectionLimits) -> Any:
    """Returns what makes connections with these limits, for uvicorn's `http` setting."""
    return partial(BoundedProtocol, limits)
