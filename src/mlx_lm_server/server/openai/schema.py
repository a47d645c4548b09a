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
MAX_CHOICES = 128
MAX_LOGPROBS = 20
MIN_PRIORITY, MAX_PRIORITY = -(2**31), 2**31 - 1


def refuse(message: str) -> PydanticCustomError:
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
        raise refuse(f"part {place} must be an object with a `type`")
    if kind != "text":
        raise refuse(f"part {place} is of type `{kind[:50]}`; this model reads text only")
    text = part.get("text")
    if not isinstance(text, str):
        raise refuse(f"part {place} must have a string in `text`")
    return text


def _prompts(value: Any) -> Any:
    """A prompt is a string, a list of strings, a list of ids, or a list of lists of ids; here it
    becomes a list of prompts."""
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list):
        raise refuse("must be a string, a list of strings, or token ids")
    kinds = set(map(type, value))
    if kinds == {int}:
        return [value]
    are_ids = kinds == {list} and all(set(map(type, item)) <= {int} for item in value)
    if value and kinds != {str} and not are_ids:
        raise refuse("must hold strings only, or token ids only, or lists of token ids only")
    return value


def _biases(value: Any) -> Any:
    """JSON has only strings as keys; they must be token ids."""
    if not isinstance(value, dict):
        return value
    found: dict[int, Any] = {}
    for key, bias in value.items():
        if not (isinstance(key, str) and key.isascii() and key.isdecimal() and len(key) < 12):
            raise refuse(f"the key {str(key)[:20]!r} is no token id")
        if bias is None:
            raise refuse(f"the bias of token {key} must be a number")
        found[int(key)] = bias
    return found


Bias = Annotated[float, Field(ge=-100, le=100)]
Stop = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARS)]
Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh"]
Count = Annotated[int, Field(ge=1)]


class Body(BaseModel):
    """Strict: no number from a string, no integer from a boolean."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, frozen=True)


RequestBody = TypeVar("RequestBody", bound=Body)


class FunctionCall(Body):
    name: str = Field(min_length=1)
    arguments: str = "{}"


class ToolCall(Body):
    id: str | None = None
    type: Literal["function"] = "function"
    index: int | None = None  # clients send a stream's pieces back as they put them together
    function: FunctionCall


class FunctionTool(Body):
    """What else a tool says is for the model to read."""

    model_config = ConfigDict(extra="allow")

    name: str = Field(min_length=1, max_length=256)
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Body):
    model_config = ConfigDict(extra="allow")

    type: Literal["function"]
    function: FunctionTool


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
    n: int | None = Field(None, ge=1, le=MAX_CHOICES)
    min_tokens: int | None = Field(None, ge=0)
    ignore_eos: bool | None = None
    typical_p: float | None = Field(None, gt=0, le=1)
    xtc_probability: float | None = Field(None, ge=0, le=1)
    xtc_threshold: float | None = Field(None, ge=0, le=0.5)
    timings: bool | None = None
    metadata: dict[str, str] | None = Field(None, max_length=16)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None
    priority: int | None = Field(None, ge=MIN_PRIORITY, le=MAX_PRIORITY)

    @model_validator(mode="after")
    def _options_need_a_stream(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise refuse("stream_options: only together with `stream: true`")
        return self

    @property
    def num_choices(self) -> int:
        return self.n or 1

    @property
    def num_logprobs(self) -> int | None:
        """Alternatives to name beside each token; None where no logprobs are asked for."""
        raise NotImplementedError

    @property
    def wants_usage(self) -> bool:
        """As a chunk of its own at the end of a stream."""
        options = self.stream_options
        return bool(self.timings) or (options is not None and options.include_usage)


class ChatMessage(Body):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Annotated[str | None, BeforeValidator(_text_of_parts)] = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None

    @model_validator(mode="after")
    def _has_content(self) -> Self:
        if self.tool_calls and self.role != "assistant":
            raise refuse("tool_calls: only an assistant calls tools")
        if self.content is None and not self.tool_calls:
            raise refuse("content: a string or a list of text parts is required")
        return self


class ChatRequest(Sampling):
    messages: list[ChatMessage] = Field(min_length=1)
    max_completion_tokens: Count | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    reasoning_effort: Effort | None = None
    tools: list[Tool] | None = Field(None, max_length=512)
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)

    @model_validator(mode="after")
    def _alternatives_need_logprobs(self) -> Self:
        if self.top_logprobs and not self.logprobs:
            raise refuse("top_logprobs: only together with `logprobs: true`")
        return self

    @property
    def num_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None


class CompletionRequest(Sampling):
    prompt: Annotated[
        list[str | list[int]], BeforeValidator(_prompts), Field(min_length=1, max_length=1024)
    ]
    max_tokens: int | None = Field(None, ge=0)
    echo: bool | None = None
    suffix: str | None = None
    logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)

    @model_validator(mode="after")
    def _no_tokens_need_an_echo(self) -> Self:
        if self.max_tokens == 0 and not self.echo:
            raise refuse("max_tokens: 0 is possible together with `echo: true` only")
        return self

    @property
    def num_logprobs(self) -> int | None:
        return self.logprobs


def parse_chat(body: Mapping[str, Any]) -> ChatRequest:
    given = fields.supported(body, ChatRequest.model_fields, fields.CHAT)
    given = known_messages(_without_empty(given))
    return validate(ChatRequest, _known_stream_options(given))


def known_messages(given: dict[str, Any]) -> dict[str, Any]:
    messages = given.get("messages")
    if isinstance(messages, list):
        given["messages"] = [
            fields.supported(m, ChatMessage.model_fields, fields.MESSAGE, f"messages[{i}].")
            if isinstance(m, dict)
            else m
            for i, m in enumerate(messages)
        ]
    return given


def _without_empty(given: dict[str, Any]) -> dict[str, Any]:
    """An empty list of tools is none."""
    return {name: value for name, value in given.items() if name != "tools" or value != []}


def parse_completion(body: Mapping[str, Any]) -> CompletionRequest:
    given = fields.supported(body, CompletionRequest.model_fields, fields.COMPLETION)
    return validate(CompletionRequest, _known_stream_options(given))


def _known_stream_options(given: dict[str, Any]) -> dict[str, Any]:
    options = given.get("stream_options")
    if isinstance(options, dict):
        given["stream_options"] = fields.supported(
            options, StreamOptions.model_fields, fields.STREAM_OPTIONS, "stream_options."
        )
    return given


def validate(kind: type[RequestBody], given: Mapping[str, Any]) -> RequestBody:
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
