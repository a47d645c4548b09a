"""The bodies of OpenAI requests. Parsing one raises only InvalidRequestError, naming the field."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)
from pydantic_core import PydanticCustomError

from mlx_lm_server.errors import InvalidRequestError
from mlx_lm_server.server.openai import fields

MAX_STOPS = 64
MAX_STOP_CHARS = 1024
MIN_SEED, MAX_SEED = -(2**63), 2**64 - 1
MIN_PRIORITY, MAX_PRIORITY = -(2**31), 2**31 - 1


def _refuse(message: str) -> PydanticCustomError:
    return PydanticCustomError("refused", "{reason}", {"reason": message})


def _stops(value: Any) -> Any:
    if value is None:
        return []
    return [value] if isinstance(value, str) else value


def _text_of_parts(value: Any) -> Any:
    """Content is a string, or a list of parts of which only text can be read here."""
    if not isinstance(value, list):
        return value
    return "\n".join(_text_of_part(part, place) for place, part in enumerate(value))


def _text_of_part(part: Any, place: int) -> str:
    if isinstance(part, str):
        return part
    kind = part.get("type") if isinstance(part, dict) else None
    if not isinstance(kind, str):
        raise _refuse(f"part {place} must be an object with a `type`")
    if kind != "text":
        raise _refuse(f"part {place} is of type `{kind[:50]}`; this model reads text only")
    text = part.get("text")
    if not isinstance(text, str):
        raise _refuse(f"part {place} must have a string in `text`")
    return text


def _prompts(value: Any) -> Any:
    """A prompt is a string, a list of strings, a list of ids, or a list of lists of ids; here it
    becomes a list of prompts."""
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list):
        raise _refuse("must be a string, a list of strings, or token ids")
    kinds = set(map(type, value))
    if kinds == {int}:
        return [value]
    are_ids = kinds == {list} and all(set(map(type, item)) <= {int} for item in value)
    if value and kinds != {str} and not are_ids:
        raise _refuse("must hold strings only, or token ids only, or lists of token ids only")
    return value


def _biases(value: Any) -> Any:
    """JSON has only strings as keys; they must be token ids."""
    if not isinstance(value, dict):
        return value
    found: dict[int, Any] = {}
    for key, bias in value.items():
        if not (isinstance(key, str) and key.isascii() and key.isdecimal() and len(key) < 12):
            raise _refuse(f"the key {str(key)[:20]!r} is no token id")
        if bias is None:
            raise _refuse(f"the bias of token {key} must be a number")
        found[int(key)] = bias
    return found


Bias = Annotated[float, Field(ge=-100, le=100)]
Stop = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARS)]
Count = Annotated[int, Field(ge=1)]


class Body(BaseModel):
    """Strict: no number from a string, no integer from a boolean."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, frozen=True)


RequestBody = TypeVar("RequestBody", bound=Body)


class StreamOptions(Body):
    include_usage: bool = False


class Sampling(Body):
    """What chat and completions have in common; null is the same as absent."""

    model: str | None = None
    max_tokens: Count | None = None
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, ge=0, le=1)
    top_k: int | None = Field(None, ge=-1, le=2**31)
    min_p: float | None = Field(None, ge=0, le=1)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    repetition_penalty: float | None = Field(None, gt=0, le=10)
    logit_bias: Annotated[dict[int, Bias] | None, BeforeValidator(_biases)] = None
    seed: int | None = Field(None, ge=MIN_SEED, le=MAX_SEED)
    stop: Annotated[list[Stop], BeforeValidator(_stops), Field(max_length=MAX_STOPS)] = []
    stop_token_ids: list[int] | None = Field(None, max_length=1024)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None
    priority: int | None = Field(None, ge=MIN_PRIORITY, le=MAX_PRIORITY)

    @model_validator(mode="after")
    def _options_need_a_stream(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise _refuse("stream_options: only together with `stream: true`")
        return self

    @property
    def wants_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage


class ChatMessage(Body):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Annotated[str | None, BeforeValidator(_text_of_parts)] = None
    name: str | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None

    @model_validator(mode="after")
    def _has_content(self) -> Self:
        if self.content is None:
            raise _refuse("content: a string or a list of text parts is required")
        return self


class ChatRequest(Sampling):
    messages: list[ChatMessage] = Field(min_length=1)
    max_completion_tokens: Count | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class CompletionRequest(Sampling):
    prompt: Annotated[
        list[str | list[int]], BeforeValidator(_prompts), Field(min_length=1, max_length=1024)
    ]


def parse_chat(body: Mapping[str, Any]) -> ChatRequest:
    given = fields.supported(body, ChatRequest.model_fields, fields.CHAT)
    messages = given.get("messages")
    if isinstance(messages, list):
        given["messages"] = [
            fields.supported(m, ChatMessage.model_fields, fields.MESSAGE, f"messages[{i}].")
            if isinstance(m, dict)
            else m
            for i, m in enumerate(messages)
        ]
    return _validate(ChatRequest, _known_stream_options(given))


def parse_completion(body: Mapping[str, Any]) -> CompletionRequest:
    given = fields.supported(body, CompletionRequest.model_fields, fields.COMPLETION)
    return _validate(CompletionRequest, _known_stream_options(given))


def _known_stream_options(given: dict[str, Any]) -> dict[str, Any]:
    options = given.get("stream_options")
    if isinstance(options, dict):
        given["stream_options"] = fields.supported(
            options, StreamOptions.model_fields, fields.STREAM_OPTIONS, "stream_options."
        )
    return given


def _validate(kind: type[RequestBody], given: Mapping[str, Any]) -> RequestBody:
    try:
        return kind.model_validate(given)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        message, param = first["msg"], _field_path(first["loc"])
        if first["type"] == "missing":
            message = "this field is required"
        raise InvalidRequestError(
            f"{param}: {message}" if param else message, param=param or None
        ) from error


def _field_path(location: tuple[int | str, ...]) -> str:
    """("messages", 0, "role") → messages[0].role"""
    path = ""
    for part in location:
        path += f"[{part}]" if isinstance(part, int) else f".{part}" if path else part
    return path
