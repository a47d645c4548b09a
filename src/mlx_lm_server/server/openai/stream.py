"""Deltas → the bytes of OpenAI's chunks, and the whole responses.

A chunk differs from the next in one string, so everything around it is encoded once per request.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from mlx_lm_server.protocol import FinishReason
from mlx_lm_server.server.generate_request import Usage

encode = msgspec.json.encode


def usage_object(usage: Usage) -> dict[str, Any]:
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
    }


class Chunks:
    """Server-sent events of one streamed request."""

    KIND = ""
    # The choice's fields on both sides of the text, and after the last text.
    BEFORE_TEXT = b""
    AFTER_TEXT = b""
    LAST = b""

    def __init__(self, id: str, created: int, model: str, *, include_usage: bool) -> None:
        head = {"id": id, "object": self.KIND, "created": created, "model": model}
        self._head = b"data: " + encode(head)[:-1] + b',"choices":['
        self._include_usage = include_usage
        # With include_usage every chunk but the last says that it has none.
        self._tail = (b'],"usage":null}' if include_usage else b"]}") + b"\n\n"
        self._after_text = self.AFTER_TEXT + b',"finish_reason":null}' + self._tail
        self._before_text = [self._before(0)]

    def _before(self, index: int) -> bytes:
        return self._head + b'{"index":%d,' % index + self.BEFORE_TEXT

    def text(self, index: int, text: str) -> bytes:
        while index >= len(self._before_text):
            self._before_text.append(self._before(len(self._before_text)))
        return self._before_text[index] + encode(text) + self._after_text

    def begin(self, index: int) -> bytes:
        """The chunk before a sequence's first text; empty where there is none."""
        return b""

    def finish(self, index: int, reason: FinishReason) -> bytes:
        choice = b'{"index":%d,' % index + self.LAST + b',"finish_reason":' + encode(reason) + b"}"
        return self._head + choice + self._tail

    def usage(self, usage: Usage) -> bytes:
        """The chunk with empty choices; nothing unless it was asked for."""
        if not self._include_usage:
            return b""
        return self._head + b'],"usage":' + encode(usage_object(usage)) + b"}\n\n"


class ChatChunks(Chunks):
    KIND = "chat.completion.chunk"
    BEFORE_TEXT = b'"delta":{"content":'
    AFTER_TEXT = b'},"logprobs":null'
    LAST = b'"delta":{},"logprobs":null'

    def begin(self, index: int) -> bytes:
        choice = (
            b'{"index":%d,"delta":{"role":"assistant","content":""},"logprobs":null,'
            b'"finish_reason":null}' % index
        )
        return self._head + choice + self._tail


class CompletionChunks(Chunks):
    KIND = "text_completion"
    BEFORE_TEXT = b'"text":'
    AFTER_TEXT = b',"logprobs":null'
    LAST = b'"text":"","logprobs":null'


def chat_response(
    id: str, created: int, model: str, sequences: Sequence[tuple[str, FinishReason]], usage: Usage
) -> bytes:
    choices = [
        {
            "index": index,
            "message": {"role": "assistant", "content": text, "refusal": None},
            "logprobs": None,
            "finish_reason": reason,
        }
        for index, (text, reason) in enumerate(sequences)
    ]
    return _response(id, "chat.completion", created, model, choices, usage)


def completion_response(
    id: str, created: int, model: str, sequences: Sequence[tuple[str, FinishReason]], usage: Usage
) -> bytes:
    choices = [
        {"index": index, "text": text, "logprobs": None, "finish_reason": reason}
        for index, (text, reason) in enumerate(sequences)
    ]
    return _response(id, "text_completion", created, model, choices, usage)


def _response(
    id: str, kind: str, created: int, model: str, choices: Sequence[Any], usage: Usage
) -> bytes:
    return encode(
        {
            "id": id,
            "object": kind,
            "created": created,
            "model": model,
            "choices": choices,
            "usage": usage_object(usage),
        }
    )
