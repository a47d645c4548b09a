"""The bodies of /tokenize, /detokenize and /apply-template."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

from pydantic import Field, model_validator

from mlx_lm_server.server.openai.schema import (
    Body,
    ChatMessage,
    Effort,
    Tool,
    known_fields,
    known_messages,
    refuse,
    validate,
)


class Rendering(Body):
    """What goes into a chat template."""

    model: str | None = None
    """A name of the served model, or `default`."""
    messages: list[ChatMessage] | None = Field(None, min_length=1)
    """A conversation."""
    add_generation_prompt: bool = True
    """End the prompt where the assistant speaks."""
    chat_template_kwargs: dict[str, Any] | None = None
    """Variables of the model's chat template, such as `enable_thinking`."""
    reasoning_effort: Effort | None = None
    """How much to think, where the chat template has a measure for it."""
    tools: list[Tool] | None = Field(None, max_length=512)
    """Functions that the model may call."""


class TokenizeRequest(Rendering):
    """`prompt` is vLLM's name and `content` llama.cpp's. Special tokens are added to a text, and
    not to a chat, whose template has them."""

    prompt: str | None = None
    """A text."""
    content: str | None = None
    """The same, by llama.cpp's name."""
    add_special_tokens: bool | None = None
    """Add what the tokenizer puts around a text. Default: true for a text, false for a chat."""
    return_token_strs: bool = False
    """Also tell how the vocabulary writes each token."""

    @model_validator(mode="after")
    def _has_one_text(self) -> Self:
        given = (self.prompt, self.content, self.messages)
        if sum(value is not None for value in given) != 1:
            raise refuse("exactly one of `prompt`, `content` and `messages` is required", "prompt")
        return self

    @property
    def text(self) -> str:
        return self.prompt if self.prompt is not None else self.content or ""

    @property
    def adds_special_tokens(self) -> bool:
        if self.add_special_tokens is not None:
            return self.add_special_tokens
        return self.messages is None


class DetokenizeRequest(Body):
    model: str | None = None
    """A name of the served model, or `default`."""
    tokens: list[int]
    """Token ids."""


class ApplyTemplateRequest(Rendering):
    messages: list[ChatMessage] = Field(min_length=1)
    """A conversation."""


def parse_tokenize(body: Mapping[str, Any]) -> TokenizeRequest:
    return validate(TokenizeRequest, known_messages(known_fields(TokenizeRequest, body)))


def parse_detokenize(body: Mapping[str, Any]) -> DetokenizeRequest:
    return validate(DetokenizeRequest, known_fields(DetokenizeRequest, body))


def parse_apply_template(body: Mapping[str, Any]) -> ApplyTemplateRequest:
    return validate(ApplyTemplateRequest, known_messages(known_fields(ApplyTemplateRequest, body)))
