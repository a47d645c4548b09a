"""A streaming HTTP client that costs little CPU, since it shares the machine with what it measures.

One connection per request; the response is parsed by httptools as it arrives and each event is
decoded once. Per token that is a tenth of what a general client needs.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Callable
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any, cast
from urllib.parse import urlsplit

import httptools
import msgspec

from mlx_lm_server.bench import sse
from mlx_lm_server.bench.trace import Trace
from mlx_lm_server.web_names import is_loopback

ERROR_TEXT_LIMIT = 300
# A timer that comes this late says that this process was held up, not that the server is silent.
HELD_UP_S = 0.5


@dataclass(frozen=True, slots=True)
class Target:
    """A server to measure. `url` with or without a trailing `/v1`; `name` is for the tables."""

    url: str
    model: str | None = None
    api_key: str | None = None
    name: str = ""

    @property
    def host(self) -> str:
        return urlsplit(self.url).hostname or "127.0.0.1"

    @property
    def is_tls(self) -> bool:
        return urlsplit(self.url).scheme == "https"

    @property
    def port(self) -> int:
        return urlsplit(self.url).port or (443 if self.is_tls else 80)

    @property
    def base_path(self) -> str:
        return urlsplit(self.url).path.rstrip("/").removesuffix("/v1")

    def is_same_server(self, other: Target) -> bool:
        """Whether both say one address, whatever model they ask for."""
        return self._address == other._address

    @property
    def _address(self) -> tuple[bool, str, int, str]:
        host = "localhost" if is_loopback(self.host) else self.host
        return self.is_tls, host, self.port, self.base_path


@dataclass(frozen=True, slots=True)
class Call:
    """One request of a workload. `body` lacks what the target decides: the model."""

    role: str
    path: str
    max_tokens: int
    body: dict[str, Any] = field(hash=False)


def encode_request(target: Target, call: Call) -> bytes:
    """The bytes of a streamed POST that asks for usage."""
    model = {} if target.model is None else {"model": target.model}
    stream = {"stream": True, "stream_options": {"include_usage": True}}
    body = msgspec.json.encode(model | call.body | {"max_tokens": call.max_tokens} | stream)
    authorization = f"Authorization: Bearer {target.api_key}\r\n" if target.api_key else ""
    host = f"[{target.host}]" if ":" in target.host else target.host
    head = (
        f"POST {target.base_path}{call.path} HTTP/1.1\r\n"
        f"Host: {host}:{target.port}\r\n"
        f"{authorization}"
        "Content-Type: application/json\r\n"
        "Accept: text/event-stream\r\n"
        "Connection: close\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


class Client:
    """Sends calls to one target and keeps the trace of each, also of those still running."""

    def __init__(self, target: Target, *, silence_s: float = 120.0) -> None:
        self.target = target
        self.traces: list[Trace] = []
        self._silence_s = silence_s
        self._tls = ssl.create_default_context() if target.is_tls else None

    def start(self, call: Call) -> tuple[Trace, asyncio.Task[Trace]]:
        """Send in the background; the trace can be watched while it grows."""
        trace = Trace(call.role, call.max_tokens, perf_counter())
        self.traces.append(trace)
        return trace, asyncio.create_task(self._run(call, trace))

    async def send(self, call: Call) -> Trace:
        """Send and wait for the end. Never raises for what the server does: see `Trace.error`."""
        _, task = self.start(call)
        return await task

    async def _run(self, call: Call, trace: Trace) -> Trace:
        loop = asyncio.get_running_loop()
        request = encode_request(self.target, call)
        trace.sent_at = perf_counter()
        connection = _Connection(request, trace, loop.create_future(), self._silence_s)
        try:
            async with asyncio.timeout(self._silence_s):
                await loop.create_connection(
                    lambda: connection, self.target.host, self.target.port, ssl=self._tls
                )
            await connection.done
        except TimeoutError:
            trace.error = f"no connection within {self._silence_s:g} s"
        except OSError as error:
            trace.error = f"no connection: {error.strerror or error}"
        except asyncio.CancelledError:
            trace.was_stopped = True
            raise
        finally:
            trace.ended_at = trace.ended_at or perf_counter()
            connection.done.cancel()  # what closing does to the connection is no error of its own
            connection.close()
        return trace


class _Connection(asyncio.Protocol):
    """One request and its response. `done` is resolved exactly once, also where all goes wrong."""

    def __init__(
        self, request: bytes, trace: Trace, done: asyncio.Future[None], silence_s: float
    ) -> None:
        self.done = done
        self._request = request
        self._trace = trace
        self._silence_s = silence_s
        self._transport: asyncio.Transport | None = None
        self._watch: asyncio.TimerHandle | None = None
        self._parser = httptools.HttpResponseParser(self)
        self._lines = sse.DataLines()
        self._now = perf_counter()
        self._saw_done = False
        self._error_body = b""

    def close(self) -> None:
        """Politely after a whole answer; else at once, which the server sees as a disconnect."""
        if self._watch is not None:
            self._watch.cancel()
        if self._transport is None:
            return
        if self._saw_done:
            self._transport.close()
        else:
            self._transport.abort()

    # ---- asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._transport.write(self._request)
        self._now = perf_counter()
        self._watch_silence()

    def data_received(self, data: bytes) -> None:
        self._now = perf_counter()
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._end(f"malformed HTTP: {error}")

    def connection_lost(self, exc: Exception | None) -> None:
        """A response without a length ends with its connection."""
        if exc is not None:
            self._end(f"connection lost: {exc}")
        self.on_message_complete()

    # ---- httptools

    def on_headers_complete(self) -> None:
        self._trace.http_status = self._parser.get_status_code()

    def on_body(self, body: bytes) -> None:
        if self._trace.http_status != 200:
            self._error_body += body[: 16 * ERROR_TEXT_LIMIT - len(self._error_body)]
            return
        for payload in self._lines.feed(body):
            self._take_event(payload)

    def on_message_complete(self) -> None:
        if self._trace.http_status != 200:
            self._end(http_error(self._trace.http_status, self._error_body))
        elif not self._saw_done:
            self._end("the stream ended without [DONE]")
        else:
            self._end()

    # ----

    def _take_event(self, payload: bytes) -> None:
        if payload == sse.DONE:
            self._saw_done = True
            self._end()
            return
        try:
            chunk = sse.decode_chunk(payload)
        except msgspec.DecodeError as error:
            self._end(f"not a chunk: {error}")
            return
        if chunk.error is not None:
            self._end(f"error event: {sse.error_message(chunk.error)}")
            return
        self._take_chunk(chunk)

    def _take_chunk(self, chunk: sse.Chunk) -> None:
        trace = self._trace
        if text := chunk.text:
            trace.event_times.append(self._now)
            trace.text_parts.append(text)
        trace.finish_reason = chunk.finish_reason or trace.finish_reason
        if (usage := chunk.usage) is not None:
            trace.prompt_tokens = usage.prompt_tokens
            trace.completion_tokens = usage.completion_tokens
            details = usage.prompt_tokens_details
            trace.cached_tokens = details.cached_tokens if details else None

    def _watch_silence(self) -> None:
        """One timer per connection that looks when the last byte came, not one per byte."""
        self._watch_again(self._now + self._silence_s)

    def _watch_again(self, due: float) -> None:
        later: Callable[..., asyncio.TimerHandle] = asyncio.get_running_loop().call_later
        self._watch = later(due - perf_counter(), self._look, due)

    def _look(self, due: float) -> None:
        now = perf_counter()
        if self._now + self._silence_s > now:
            self._watch_silence()
        elif now - due > HELD_UP_S:
            self._watch_again(now + self._silence_s)
        else:
            self._end(f"stalled: nothing came for {self._silence_s:g} s")

    def _end(self, error: str | None = None) -> None:
        if self.done.done():
            return
        self._trace.error = error
        self._trace.ended_at = perf_counter()
        self.done.set_result(None)


def http_error(status: int, body: bytes) -> str:
    if status == 0:
        return "the connection closed without a response"
    try:
        message = sse.error_message(msgspec.json.decode(body)["error"])
    except (msgspec.DecodeError, KeyError, TypeError):
        message = body.decode(errors="replace")
    return f"HTTP {status}: {message[:ERROR_TEXT_LIMIT]}"
