"""Deltas → the bytes of OpenAI's chunks, and the whole responses.

A chunk of plain text differs from the next in one string, so everything around it is encoded once
per request; other chunks are put together as objects.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import msgspec

from mlx_lm_server.parsing.message import MessageDelta
from mlx_lm_server.server.answers.generate_request import (
    Answer,
    Delta,
    PromptProgress,
    Usage,
)
from mlx_lm_server.server.protocols.openai.logprobs import (
    TokenBytes,
    chat_logprobs,
    completion_logprobs,
    prompt_logprobs,
)

encode = msgspec.json.encode
NOTHING_MORE: Mapping[str, Any] = MappingProxyType({})


def usage_object(usage: Usage) -> dict[str, Any]:
    found: dict[str, Any] = {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
    }
    if usage.reasoning_tokens is not None:
        found["completion_tokens_details"] = {"reasoning_tokens": usage.reasoning_tokens}
    if usage.timings is not None:
        found["timings"] = msgspec.to_builtins(usage.timings)
    if usage.cache is not None:
        found["cache"] = usage.cache
    if usage.num_resumed:
        found["resumed"] = usage.num_resumed
    return found


@dataclass(frozen=True, slots=True)
class Head:
    """What all chunks of a response say, or the response itself."""

    id: str
    created: int
    model: str
    metadata: Mapping[str, str] | None = None

    def fields(self, kind: str) -> dict[str, Any]:
        found = {"id": self.id, "object": kind, "created": self.created, "model": self.model}
        return found if self.metadata is None else {**found, "metadata": self.metadata}


class Chunks:
    """Server-sent events of one streamed request."""

    KIND = ""
    # The choice's fields on both sides of the text, and after the last text.
    BEFORE_TEXT = b""
    AFTER_TEXT = b""
    LAST = b""

    def __init__(self, head: Head, tokenizer: TokenBytes, *, include_usage: bool) -> None:
        self._head = b"data: " + encode(head.fields(self.KIND))[:-1] + b',"choices":['
        self._tokenizer = tokenizer
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

    def rich(self, delta: Delta) -> bytes:
        """Chunks of a delta that is more than text."""
        raise NotImplementedError

    def _chunk(self, index: int, fields: Mapping[str, Any]) -> bytes:
        choice = encode({"index": index, **fields, "finish_reason": None})
        return self._head + choice + self._tail

    def begin(self, delta: Delta) -> bytes:
        """The chunk before a sequence's first text; empty where there is none."""
        return b""

    def finish(self, delta: Delta) -> bytes:
        why = b',"finish_reason":%b,"stop_reason":%b%b}' % (
            encode(delta.finish_reason),
            encode(delta.stop_reason),
            b',"resumed":%d' % delta.num_resumed if delta.num_resumed else b"",
        )
        return self._head + b'{"index":%d,' % delta.index + self.LAST + why + self._tail

    def progress(self, index: int, progress: PromptProgress) -> bytes:
        """A chunk with empty choices, in llama.cpp's words."""
        told = {
            "index": index,
            "total": progress.num_prompt,
            "cache": progress.num_cached,
            "processed": progress.num_computed,
            "time_ms": round(progress.elapsed_s * 1000),
        }
        return self._head + b'],"prompt_progress":' + encode(told) + b"}\n\n"

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

    def begin(self, delta: Delta) -> bytes:
        choice = (
            b'{"index":%d,"delta":{"role":"assistant","content":""},"logprobs":null,'
            b'"finish_reason":null}' % delta.index
        )
        if delta.prompt_token_ids is None:
            return self._head + choice + self._tail
        ids = b'],"prompt_token_ids":' + encode(delta.prompt_token_ids)
        return self._head + choice + ids + self._tail[1:]

    def rich(self, delta: Delta) -> bytes:
        said = _message_fields(delta.message) if delta.message is not None else {}
        if delta.text or not said:
            said["content"] = delta.text
        scores = chat_logprobs(delta.tokens, self._tokenizer) if delta.tokens else None
        return self._chunk(delta.index, {"delta": said, "logprobs": scores, **_token_ids(delta)})


class CompletionChunks(Chunks):
    KIND = "text_completion"
    BEFORE_TEXT = b'"text":'
    AFTER_TEXT = b',"logprobs":null'
    LAST = b'"text":"","logprobs":null'

    def rich(self, delta: Delta) -> bytes:
        scores = completion_logprobs(delta.tokens, self._tokenizer) if delta.tokens else None
        fields = {"text": delta.text, "logprobs": scores, **_token_ids(delta)}
        if delta.prompt_token_ids is not None:
            fields["prompt_token_ids"] = delta.prompt_token_ids
        return self._chunk(delta.index, fields)


def _token_ids(what: Delta | Answer) -> dict[str, Any]:
    return {} if what.token_ids is None else {"token_ids": what.token_ids}


def _message_fields(message: MessageDelta) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if message.reasoning:
        found["reasoning_content"] = message.reasoning
    if message.calls:
        found["tool_calls"] = [
            {"index": call.index, "function": {"arguments": call.arguments}}
            if call.id is None
            else {
                "index": call.index,
                "id": call.id,
                "type": "function",
                "function": {"name": call.name, "arguments": call.arguments},
            }
            for call in message.calls
        ]
    if message.warnings:
        found["warning"] = "; ".join(dict.fromkeys(message.warnings))
    return found


def chat_response(
    head: Head, answers: Sequence[Answer], usage: Usage, tokenizer: TokenBytes
) -> bytes:
    choices = [
        {
            "index": index,
            "message": _message(answer),
            "logprobs": _chat_scores(answer, tokenizer),
            "finish_reason": answer.finish_reason,
            "stop_reason": answer.stop_reason,
            **_token_ids(answer),
        }
        for index, answer in enumerate(answers)
    ]
    more = _of_prompt(answers[0], tokenizer)
    return _response(head, "chat.completion", choices, usage, more)


def _chat_scores(answer: Answer, tokenizer: TokenBytes) -> dict[str, Any] | None:
    return None if answer.tokens is None else chat_logprobs(answer.tokens, tokenizer)


def _completion_scores(answer: Answer, tokenizer: TokenBytes) -> dict[str, Any] | None:
    return None if answer.tokens is None else completion_logprobs(answer.tokens, tokenizer)


def _message(answer: Answer) -> dict[str, Any]:
    """Content is null where there is nothing but calls or reasoning."""
    is_empty = not answer.text and bool(answer.calls or answer.reasoning)
    found: dict[str, Any] = {
        "role": "assistant",
        "content": None if is_empty else answer.text,
        "refusal": None,
    }
    if answer.reasoning:
        found["reasoning_content"] = answer.reasoning
    if answer.calls:
        found["tool_calls"] = [
            {"id": id, "type": "function", "function": {"name": name, "arguments": arguments}}
            for id, name, arguments in answer.calls
        ]
    if answer.warnings:
        found["warning"] = "; ".join(dict.fromkeys(answer.warnings))
    return found


def completion_response(
    head: Head, answers: Sequence[Answer], usage: Usage, tokenizer: TokenBytes
) -> bytes:
    choices = [
        {
            "index": index,
            "text": answer.text,
            "logprobs": _completion_scores(answer, tokenizer),
            "finish_reason": answer.finish_reason,
            "stop_reason": answer.stop_reason,
            **_token_ids(answer),
            **_of_prompt(answer, tokenizer),
        }
        for index, answer in enumerate(answers)
    ]
    return _response(head, "text_completion", choices, usage)


def _of_prompt(answer: Answer, tokenizer: TokenBytes) -> dict[str, Any]:
    """Returns what is told of a prompt, which vLLM has beside the choices of a chat and in each
    choice of completions."""
    found: dict[str, Any] = {}
    if answer.prompt_tokens is not None:
        found["prompt_logprobs"] = prompt_logprobs(answer.prompt_tokens, tokenizer)
    if answer.prompt_token_ids is not None:
        found["prompt_token_ids"] = answer.prompt_token_ids
    return found


def _response(
    head: Head,
    kind: str,
    choices: Sequence[Any],
    usage: Usage,
    more: Mapping[str, Any] = NOTHING_MORE,
) -> bytes:
    found = {**head.fields(kind), "choices": choices, "usage": usage_object(usage)}
    return encode({**found, **more})
