"""Answers a request from its Generation: as server-sent events, or at once when it is done.

While a request is in the engine, `receive` is watched: a client that leaves is noticed at once and
its rows are given back, streamed or not.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Protocol

import msgspec
from starlette.types import Receive, Scope, Send

from mlx_lm_server.errors import ClientGoneError, ServerError
from mlx_lm_server.server.answers.generate_request import (
    Answer,
    Delta,
    PromptProgress,
    Usage,
)
from mlx_lm_server.server.engines.generation import Generation
from mlx_lm_server.server.http.http_errors import describe

DONE = b"data: [DONE]\n\n"
KEEP_ALIVE = b": keep-alive\n\n"
START = {
    "type": "http.response.start",
    "status": 200,
    "headers": [
        (b"content-type", b"text/event-stream; charset=utf-8"),
        (b"cache-control", b"no-cache"),
        (b"x-accel-buffering", b"no"),  # nginx would hold the tokens back
    ],
}


class ChunkWriter(Protocol):
    """A protocol's bytes for what happens to a sequence, of which a delta tells."""

    def begin(self, delta: Delta) -> bytes: ...
    def text(self, index: int, text: str) -> bytes: ...
    def rich(self, delta: Delta) -> bytes: ...
    def finish(self, delta: Delta) -> bytes: ...
    def progress(self, index: int, progress: PromptProgress) -> bytes: ...
    def usage(self, usage: Usage) -> bytes: ...


@asynccontextmanager
async def cancelled_on_disconnect(receive: Receive, generation: Generation) -> AsyncIterator[None]:
    """Inside, a client that leaves ends the generation with ClientGoneError. Closes it at the end,
    however that comes about."""
    watcher = asyncio.create_task(_watch(receive, generation))
    try:
        yield
    finally:
        watcher.cancel()
        generation.close()


async def _watch(receive: Receive, generation: Generation) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    generation.cancel(ClientGoneError("the client closed its connection"))


async def collect(generation: Generation, receive: Receive, num_sequences: int) -> list[Answer]:
    """Returns what each sequence says. Raises what ended the request otherwise."""
    answers = [Answer() for _ in range(num_sequences)]
    async with cancelled_on_disconnect(receive, generation):
        while not generation.is_done:
            for delta in await generation.next():
                answers[delta.index].add(delta)
    return answers


class EventStream:
    """An ASGI response. The status waits for the first token, so that an error before it still has
    a status of its own; an error after it is an event, and the stream ends in order. Where the
    first token takes longer than `keep_alive_s`, the stream begins with comments instead, and
    where later nothing was said for so long (tokens without text, a text held back) comments come
    too, so that nobody on the way takes it for dead."""

    def __init__(
        self,
        generation: Generation,
        writer: ChunkWriter,
        *,
        keep_alive_s: float = 0.0,
        usage: Callable[[], Usage],
    ) -> None:
        self._generation = generation
        self._writer = writer
        self._keep_alive_s = keep_alive_s
        self._usage = usage
        self._has_begun: set[int] = set()
        self._is_open = False
        self._has_sent = False  # since the keeper looked last

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with cancelled_on_disconnect(receive, self._generation):
            try:
                last = await self._stream(send)
            except ClientGoneError:
                raise
            except ServerError as error:
                if not self._is_open:
                    raise
                _, body = describe(error)
                last = b"data: " + msgspec.json.encode(body) + b"\n\n"
            await send({"type": "http.response.body", "body": last + DONE})

    async def _stream(self, send: Send) -> bytes:
        """Sends all events but the last ones, which it returns."""
        generation = self._generation
        deltas = await self._first(send)
        while all(delta.progress is not None for delta in deltas):
            await self._send(send, self._encode(deltas))
            deltas = await self._first(send)
        await self._open(send)
        keeper = asyncio.create_task(self._keep_alive(send)) if self._keep_alive_s else None
        try:
            while not generation.is_done:
                if body := self._encode(deltas):
                    self._has_sent = True
                    await send({"type": "http.response.body", "body": body, "more_body": True})
                deltas = await generation.next()
        finally:
            if keeper is not None:
                keeper.cancel()
        return self._encode(deltas) + self._writer.usage(self._usage())

    async def _keep_alive(self, send: Send) -> None:
        """Sends a comment where nothing was said for one to two intervals."""
        while True:
            self._has_sent = False
            await asyncio.sleep(self._keep_alive_s)
            if not self._has_sent:
                await self._send(send, KEEP_ALIVE)

    async def _open(self, send: Send) -> None:
        if not self._is_open:
            self._is_open = True
            await send({**START})

    async def _send(self, send: Send, body: bytes) -> None:
        await self._open(send)
        await send({"type": "http.response.body", "body": body, "more_body": True})

    async def _first(self, send: Send) -> list[Delta]:
        """Returns the next deltas, and sends comments until they come."""
        if not self._keep_alive_s:
            return await self._generation.next()
        first = asyncio.ensure_future(self._generation.next())
        try:
            while not (await asyncio.wait({first}, timeout=self._keep_alive_s))[0]:
                await self._send(send, KEEP_ALIVE)
            return first.result()
        finally:
            first.cancel()

    def _encode(self, deltas: Sequence[Delta]) -> bytes:
        writer = self._writer
        chunks = []
        for delta in deltas:
            if delta.progress is not None:
                chunks.append(writer.progress(delta.index, delta.progress))
                continue
            if delta.index not in self._has_begun:
                self._has_begun.add(delta.index)
                chunks.append(writer.begin(delta))
            if not delta.is_plain:
                chunks.append(writer.rich(delta))
            elif delta.text:
                chunks.append(writer.text(delta.index, delta.text))
            if delta.finish_reason is not None:
                chunks.append(writer.finish(delta))
        return b"".join(chunks)
