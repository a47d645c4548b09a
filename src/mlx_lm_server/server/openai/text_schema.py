"""The bodies of /tokenize, /detokenize and /apply-template."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

from pydantic import Field, model_validator

from mlx_lm_server.server.openai import fields
from mlx_lm_server.server.openai.schema import (
    Body,
    ChatMessage,
    Effort,
    Tool,
    known_messages,
    refuse,
    validate,
)


class Rendering(Body):
    """What goes into a chat template."""

    model: str | None = None
    messages: list[ChatMessage] | None = Field(None, min_length=1)
    add_generation_prompt: bool = True
    chat_template_kwargs: dict[str, Any] | None = None
    reasoning_effort: Effort | None = None
    tools: list[Tool] | None = Field(None, max_length=512)


class TokenizeRequest(Rendering):
    """`prompt` is vLLM's name and `content` llama.cpp's. Special tokens are added to a text, and
    not to a chat, whose template has them."""

    prompt: str | None = None
    content: str | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool = False

    @model_validator(mode="after")
    def _has_one_text(self) -> Self:
        given = (self.prompt, self.content, self.messages)
        if sum(value is not None for value in given) != 1:
            raise refuse("prompt: exactly one of `prompt`, `content` and `messages` is required")
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
    tokens: list[int]


class ApplyTemplateRequest(Rendering):
    messages: list[ChatMessage] = Field(min_length=1)


def parse_tokenize(body: Mapping[str, Any]) -> TokenizeRequest:
    given = fields.supported(body, TokenizeRequest.model_fields, {})
    return validate(TokenizeRequest, known_messages(given))


def parse_detokenize(body: Mapping[str, Any]) -> DetokenizeRequest:
    return validate(DetokenizeRequest, fields.supported(body, DetokenizeRequest.model_fields, {}))


def parse_apply_template(body: Mapping[str, Any]) -> ApplyTemplateRequest:
    given = fields.supported(body, ApplyTemplateRequest.model_fields, {})
    return validate(ApplyTemplateRequest, known_messages(given))
