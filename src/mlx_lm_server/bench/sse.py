"""The pieces of an OpenAI stream that a load generator needs, decoded as cheaply as may be."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgspec

DONE = b"[DONE]"


class Delta(msgspec.Struct, frozen=True):
    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None


class Choice(msgspec.Struct, frozen=True):
    text: str | None = None
    delta: Delta | None = None
    finish_reason: str | None = None


class PromptDetails(msgspec.Struct, frozen=True):
    cached_tokens: int | None = None


class Usage(msgspec.Struct, frozen=True):
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    prompt_tokens_details: PromptDetails | None = None


class Chunk(msgspec.Struct, frozen=True):
    """One event of `/v1/completions` or `/v1/chat/completions`."""

    choices: list[Choice] = []
    usage: Usage | None = None
    error: Any = None

    @property
    def text(self) -> str:
        return "".join(choice_text(choice) for choice in self.choices)

    @property
    def finish_reason(self) -> str | None:
        return next((c.finish_reason for c in self.choices if c.finish_reason), None)


def choice_text(choice: Choice) -> str:
    delta = choice.delta
    if delta is None:
        return choice.text or ""
    return delta.content or delta.reasoning_content or delta.reasoning or ""


decode_chunk = msgspec.json.Decoder(Chunk).decode


class DataLines:
    """Cuts a byte stream into the payloads of its `data:` lines; OpenAI's events have one each."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> Iterator[bytes]:
        lines = (self._rest + data).split(b"\n")
        self._rest = lines.pop()
        for line in lines:
            if line.startswith(b"data:"):
                yield line[5:].strip()


def error_message(error: Any) -> str:
    """The text within OpenAI's error object, or whatever else a server sends in its place."""
    if isinstance(error, dict):
        return str(error.get("message", error))
    return str(error)
