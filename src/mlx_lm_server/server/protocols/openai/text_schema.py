"""The bodies of /tokenize, /detokenize and /apply-template."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

from pydantic import Field, model_validator

from mlx_lm_server.server.protocols.openai.schema import (
    MAX_TEMPLATE_CHARS,
    Body,
    ChatMessage,
    Effort,
    Tool,
    check_continued,
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
    add_generation_prompt: bool | None = None
    """End the prompt where the assistant speaks. Default: true, but where a message is
    continued."""
    continue_final_message: bool | None = None
    """End the prompt where the last message, an assistant's, ends."""
    chat_template: str | None = Field(None, min_length=1, max_length=MAX_TEMPLATE_CHARS)
    """A jinja template instead of the model's; only with --trust-request-chat-template."""
    chat_template_kwargs: dict[str, Any] | None = None
    """Variables of the model's chat template, such as `enable_thinking`."""
    reasoning_effort: Effort | None = None
    """How much to think, where the chat template has a measure for it."""
    tools: list[Tool] | None = Field(None, max_length=512)
    """Functions that the model may call."""

    @model_validator(mode="after")
    def _can_be_continued(self) -> Self:
        check_continued(
            self.messages or (), self.continue_final_message, self.add_generation_prompt
        )
        return self

    @property
    def continues(self) -> bool:
        return bool(self.continue_final_message or (self.messages and self.messages[-1].prefix))


class TokenizeRequest(Rendering):
    """vLLM's fields, and llama.cpp's: `content`, `add_special`, `parse_special`, `with_pieces`."""

    prompt: str | None = None
    """A text."""
    content: str | None = None
    """The same, by llama.cpp's name."""
    add_special_tokens: bool | None = None
    """Add what the tokenizer puts around a text. Default: true for `prompt`; false for `content`,
    as in llama.cpp, and for a chat, whose template has it."""
    add_special: bool | None = None
    """The same, by llama.cpp's name."""
    parse_special: bool | None = None
    """false: what reads like a special token is text. Default true."""
    with_pieces: bool = False
    """Tell each token as an object of its `id` and its `piece` of the text."""
    return_token_strs: bool = False
    """Also tell how the vocabulary writes each token."""

    @model_validator(mode="after")
    def _has_one_text(self) -> Self:
        given = (self.prompt, self.content, self.messages)
        if sum(value is not None for value in given) != 1:
            raise refuse("exactly one of `prompt`, `content` and `messages` is required", "prompt")
        return self

    @model_validator(mode="after")
    def _is_told_once(self) -> Self:
        if None not in (self.add_special, self.add_special_tokens):
            raise refuse("the same as `add_special_tokens`; give one of them", "add_special")
        return self

    @property
    def text(self) -> str:
        return self.prompt if self.prompt is not None else self.content or ""

    @property
    def adds_special_tokens(self) -> bool:
        for asked in (self.add_special_tokens, self.add_special):
            if asked is not None:
                return asked
        return self.prompt is not None


class DetokenizeRequest(Body):
    """The same in vLLM and llama.cpp."""

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
