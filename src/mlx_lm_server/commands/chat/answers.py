"""An answer as it comes over HTTP: pieces of text, then what it took."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import httpx
import msgspec

from mlx_lm_server.bench import sse
from mlx_lm_server.commands.running_server import (
    RefusedError,
    RunningServer,
    UnreachableError,
    refusal,
)


@dataclass(frozen=True)
class Piece:
    """Some more of the answer, or of the thinking before it."""

    text: str
    is_thought: bool = False


@dataclass(frozen=True)
class End:
    """Why the answer ended, and its tokens, where the server says so."""

    reason: str | None = None
    num_tokens: int | None = None


Stream = Generator[Piece | End, None, None]


class Answers:
    """Asks one server for one answer after the other. `fields` are those of every request."""

    def __init__(
        self, server: RunningServer, client: httpx.Client, fields: Mapping[str, Any]
    ) -> None:
        self._server = server
        self._client = client
        self._fields = fields

    def first_model(self) -> str | None:
        """Returns the name that /v1/models lists first. Raises where the server does not let us
        in."""
        with self._server.translating():
            response = self._client.get("/v1/models")
        if response.status_code in (404, 405):
            return None
        if response.status_code != 200:
            raise refusal(response.status_code, response.content)
        try:
            return str(response.json()["data"][0]["id"])
        except (ValueError, LookupError, TypeError):
            return None

    def stream(self, messages: list[dict[str, str]]) -> Stream:
        """Yields pieces, and the end last. Closing it early tells the server, which stops.

        Raises RefusedError or UnreachableError.
        """
        asked = {"stream": True, "stream_options": {"include_usage": True}}
        body = {"messages": messages, **asked, **self._fields}
        with (
            self._server.translating(),
            self._client.stream("POST", "/v1/chat/completions", json=body) as response,
        ):
            if response.status_code != 200:
                raise refusal(response.status_code, response.read())
            yield from pieces_of(response.iter_bytes())


def pieces_of(data: Iterator[bytes]) -> Stream:
    """Yields what the bytes of an event stream say. Raises UnreachableError where it breaks off,
    and RefusedError for an error within it."""
    lines = sse.DataLines()
    end = End()
    for payload in (payload for block in data for payload in lines.feed(block)):
        if payload == sse.DONE:
            yield end
            return
        try:
            chunk = sse.decode_chunk(payload)
        except msgspec.DecodeError as error:
            raise UnreachableError(f"what came is no answer: {error}") from error
        if chunk.error is not None:
            raise RefusedError(" ".join(sse.error_message(chunk.error).split()))
        for choice in chunk.choices:
            yield from _pieces(choice)
        num_tokens = chunk.usage.completion_tokens if chunk.usage else None
        end = End(chunk.finish_reason or end.reason, num_tokens or end.num_tokens)
    raise UnreachableError("the answer broke off")


def _pieces(choice: sse.Choice) -> Iterator[Piece]:
    delta = choice.delta
    if delta is None:
        return
    if thought := delta.reasoning_content or delta.reasoning:
        yield Piece(thought, is_thought=True)
    if delta.content:
        yield Piece(delta.content)
