"""Answers a request from its Generation: as server-sent events, or at once when it is done.

While a request is in the engine, `receive` is watched: a client that leaves is noticed at once and
its rows are given back, streamed or not.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Protocol

import msgspec
from starlette.types import Receive, Scope, Send

from mlx_lm_server.errors import ServerError
from mlx_lm_server.protocol import FinishReason
from mlx_lm_server.server.generate_request import Delta, Usage
from mlx_lm_server.server.generation import ClientGoneError, Generation
from mlx_lm_server.server.http_errors import describe

DONE = b"data: [DONE]\n\n"
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
    """A protocol's bytes for what happens to sequence `index`."""

    def begin(self, index: int) -> bytes: ...
    def text(self, index: int, text: str) -> bytes: ...
    def finish(self, index: int, reason: FinishReason) -> bytes: ...
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


async def collect(
    generation: Generation, receive: Receive, num_sequences: int
) -> list[tuple[str, FinishReason]]:
    """Text and finish reason of each sequence. Raises what ended the request otherwise."""
    texts: list[list[str]] = [[] for _ in range(num_sequences)]
    reasons: list[FinishReason] = ["error"] * num_sequences
    async with cancelled_on_disconnect(receive, generation):
        while not generation.is_done:
            for delta in await generation.next():
                texts[delta.index].append(delta.text)
                if delta.finish_reason is not None:
                    reasons[delta.index] = delta.finish_reason
    return [("".join(pieces), reason) for pieces, reason in zip(texts, reasons, strict=True)]


class EventStream:
    """An ASGI response. The status waits for the first token, so that an error before it still has
    a status of its own; an error after it is an event, and the stream ends in order."""

    def __init__(self, generation: Generation, writer: ChunkWriter) -> None:
        self._generation = generation
        self._writer = writer
        self._has_begun: set[int] = set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        generation = self._generation
        async with cancelled_on_disconnect(receive, generation):
            deltas = await generation.next()
            await send({**START})
            try:
                while not generation.is_done:
                    await send(
                        {
                            "type": "http.response.body",
                            "body": self._encode(deltas),
                            "more_body": True,
                        }
                    )
                    deltas = await generation.next()
                last = self._encode(deltas) + self._writer.usage(generation.usage())
            except ClientGoneError:
                raise
            except ServerError as error:
                _, body = describe(error)
                last = b"data: " + msgspec.json.encode(body) + b"\n\n"
            await send({"type": "http.response.body", "body": last + DONE})

    def _encode(self, deltas: Sequence[Delta]) -> bytes:
        writer = self._writer
        chunks = []
        for delta in deltas:
            if delta.index not in self._has_begun:
                self._has_begun.add(delta.index)
                chunks.append(writer.begin(delta.index))
            if delta.text:
                chunks.append(writer.text(delta.index, delta.text))
            if delta.finish_reason is not None:
                chunks.append(writer.finish(delta.index, delta.finish_reason))
        return b"".join(chunks)
