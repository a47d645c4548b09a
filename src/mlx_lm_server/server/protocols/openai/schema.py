"""The bodies of OpenAI requests. Parsing one raises only InvalidRequestError, naming the field.

What is said below a field is what /openapi.json and /docs say of it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, Self, TypeVar

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
from mlx_lm_server.server.protocols.openai import fields

MAX_STOPS = 64
MAX_STOP_CHARS = 1024
MIN_SEED, MAX_SEED = -(2**63), 2**64 - 1
MAX_CHOICES = 128
MAX_PROMPTS = 1024
MAX_LOGPROBS = 20
MAX_BAD_WORDS = 256
MAX_BAD_WORD_CHARS = 256
MAX_HINT_CHARS = 1024
MIN_PRIORITY, MAX_PRIORITY = -(2**31), 2**31 - 1
MAX_TEMPLATE_CHARS = 200_000
# Kinds of parts that are text → the field that has it.
TEXT_PARTS = {"text": "text", "refusal": "refusal"}


def refuse(message: str, field: str = "") -> PydanticCustomError:
    """`field` where a whole body is checked and one of its fields is to blame."""
    return PydanticCustomError("refused", "{reason}", {"reason": message, "field": field})


def _stops(value: Any) -> Any:
    if value is None:
        return []
    return [value] if isinstance(value, str) else value


def _content(value: Any) -> Any:
    """Content is a string, or a list of parts of which only text can be read here. One part is as
    good as its text."""
    if not isinstance(value, list):
        return value
    texts = [_text_of_part(part, place) for place, part in enumerate(value)]
    if len(texts) < 2:
        return "".join(texts)
    return [{"type": "text", "text": text} for text in texts]


def _text_of_part(part: Any, place: int) -> str:
    if isinstance(part, str):
        return part
    kind = part.get("type") if isinstance(part, dict) else None
    if not isinstance(kind, str):
        raise refuse(f"part {place} must be an object with a `type`")
    if kind not in TEXT_PARTS:
        raise refuse(f"part {place} is of type `{kind[:50]}`; this model reads text only")
    text = part.get(TEXT_PARTS[kind])
    if not isinstance(text, str):
        raise refuse(f"part {place} must have a string in `{TEXT_PARTS[kind]}`")
    return text


def _arguments(value: Any) -> Any:
    """Arguments of a call are JSON text; some clients keep the object, or nothing."""
    if value is None:
        return "{}"
    return json.dumps(value, ensure_ascii=False) if isinstance(value, dict) else value


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
Stops = Annotated[list[Stop], Field(max_length=MAX_STOPS)]
Count = Annotated[int, Field(ge=1)]
BadWord = Annotated[str, Field(min_length=1, max_length=MAX_BAD_WORD_CHARS)]
Hint = Annotated[str, Field(max_length=MAX_HINT_CHARS)]
GivenBiases = Annotated[
    dict[Annotated[str, Field(pattern="^[0-9]{1,11}$")], Bias],
    Field(json_schema_extra={"additionalProperties": False}),
]
Prompts = Annotated[list[str | list[int]], Field(min_length=1, max_length=MAX_PROMPTS)]
GivenPrompts = (
    str
    | Annotated[list[str], Field(min_length=1, max_length=MAX_PROMPTS)]
    | Annotated[list[int], Field(min_length=1)]
    | Annotated[
        list[Annotated[list[int], Field(min_length=1)]],
        Field(min_length=1, max_length=MAX_PROMPTS),
    ]
)


def _tell_more(schema: dict[str, Any], body: type[Body]) -> None:
    """In the document stand the fields that are not done, too, with what they may be, and rules
    that types do not tell."""
    schema |= body.rules
    for name, neutral in body.not_done.items():
        schema.setdefault("properties", {})[name] = {
            "enum": [None, *neutral],
            "description": "Not supported: refused by name, but for values that change nothing.",
        }


class Body(BaseModel):
    """Strict: no number from a string, no integer from a boolean. `not_done` are the fields that
    are known and refused, see fields.py; `rules` is JSON Schema of what a validator checks."""

    model_config = ConfigDict(
        strict=True,
        extra="forbid",
        allow_inf_nan=False,
        frozen=True,
        use_attribute_docstrings=True,
        json_schema_extra=_tell_more,
    )
    not_done: ClassVar[fields.Neutral] = {}
    rules: ClassVar[dict[str, Any]] = {}


RequestBody = TypeVar("RequestBody", bound=Body)


class FunctionCall(Body):
    """What clients add to it has no meaning here."""

    model_config = ConfigDict(extra="ignore")

    name: str = Field(min_length=1)
    """Name of the function."""
    arguments: Annotated[
        str, BeforeValidator(_arguments, json_schema_input_type=str | dict[str, Any] | None)
    ] = "{}"
    """Arguments as JSON text. What is no object is let through: a model once wrote it."""


class ToolCall(Body):
    """What clients add to it has no meaning here."""

    model_config = ConfigDict(extra="ignore")

    id: str | None = None
    """Id that the tool's result names in `tool_call_id`."""
    type: Literal["function"] | None = "function"
    """Always `function`."""
    index: int | None = None
    """Place in a stream; clients send it back, it has no meaning here."""
    function: FunctionCall
    """What was called."""


class FunctionTool(Body):
    """What else a tool says is for the model to read."""

    model_config = ConfigDict(extra="allow")

    name: str = Field(min_length=1, max_length=256)
    """Name that the model calls."""
    description: str | None = None
    """When and how to use it, for the model to read."""
    parameters: dict[str, Any] | None = None
    """JSON schema of the arguments."""
    strict: bool | None = None
    """Hold a call back until its arguments are complete and fit the schema."""


class Tool(Body):
    model_config = ConfigDict(extra="allow")

    type: Literal["function"]
    """Always `function`."""
    function: FunctionTool
    """What the model may call."""


class StreamOptions(Body):
    not_done = fields.STREAM_OPTIONS

    include_usage: bool = False
    """End the stream with a chunk that has `usage` and no choices."""


class Sampling(Body):
    """What chat and completions have in common; null is the same as absent."""

    model: str | None = None
    """A name of the served model, or `default`."""
    max_tokens: int | None = Field(None, ge=0)
    """Most tokens to generate; unset: what is left of the context, or --default-max-tokens. 0 is
    possible together with `prompt_logprobs`, and with `echo` of completions."""
    temperature: float | None = Field(None, ge=0, le=2)
    """0 takes the likeliest token. Unset: --default-temperature, else the model's, else 1."""
    top_p: float | None = Field(None, ge=0, le=1)
    """Draw from the likeliest tokens that together have this probability."""
    top_k: int | None = Field(None, ge=-1, le=2**31)
    """Draw from so many of the likeliest tokens; 0 and -1 are off."""
    min_p: float | None = Field(None, ge=0, le=1)
    """Drop tokens less likely than this share of the likeliest."""
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    """Taken off the logit of each token that the answer has."""
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    """Taken off the logit of a token for each time that the answer has it."""
    repetition_penalty: float | None = Field(None, gt=0, le=10)
    """Divides the positive logits of tokens of prompt and answer, and multiplies negative ones."""
    logit_bias: Annotated[
        dict[int, Bias] | None,
        BeforeValidator(_biases, json_schema_input_type=GivenBiases | None),
    ] = None
    """Added to the logits of tokens, by id."""
    seed: int | None = Field(None, ge=MIN_SEED, le=MAX_SEED)
    """The same seed gives the same tokens, whatever else runs. Choice i draws with seed + i."""
    stop: Annotated[
        list[Stop],
        Field(max_length=MAX_STOPS),
        BeforeValidator(_stops, json_schema_input_type=Stop | Stops | None),
    ] = []
    """Texts before which the answer ends."""
    stop_token_ids: list[int] | None = Field(None, max_length=1024)
    """Tokens before which the answer ends."""
    include_stop_str_in_output: bool | None = None
    """Leave the stop string, or the text of the stop token, in the answer."""
    n: int | None = Field(None, ge=1, le=MAX_CHOICES)
    """Number of choices."""
    min_tokens: int | None = Field(None, ge=0)
    """Nothing ends the answer before it has so many tokens."""
    ignore_eos: bool | None = None
    """Go on after the model's end tokens."""
    typical_p: float | None = Field(None, gt=0, le=1)
    """Locally typical sampling; 1 is off."""
    xtc_probability: float | None = Field(None, ge=0, le=1)
    """How often XTC drops the likeliest tokens; 0 is off."""
    xtc_threshold: float | None = Field(None, ge=0, le=0.5)
    """XTC drops all tokens above this probability but the least likely of them. Default 0.1."""
    allowed_token_ids: list[int] | None = Field(None, min_length=1)
    """Draw no other tokens; the model's end tokens are to be named too where it may end."""
    bad_words: list[BadWord] | None = Field(None, max_length=MAX_BAD_WORDS)
    """Texts whose tokens are never drawn in this order, with a space before them or without."""
    skip_special_tokens: bool | None = None
    """false: special tokens have their text in the answer. Default true."""
    truncate_prompt_tokens: int | None = Field(None, ge=-1)
    """Keep so many tokens of the prompt, the last ones; -1: as many as the model can take."""
    return_token_ids: bool | None = None
    """Tell the ids of the answer's tokens in `token_ids`, and the prompt's in `prompt_token_ids`.
    """
    prompt_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    """Tell the log probability of each token of the prompt, and so many of the likeliest; not in a
    stream."""
    timings: bool | None = None
    """Tell seconds and paces in `usage.timings`."""
    explain_cache: bool | None = None
    """Tell in `usage.cache` how much of the prompt was cached, and where it left what is."""
    cache_salt: str | None = Field(None, min_length=1, max_length=256)
    """Share cached prefixes only with requests of the same salt."""
    metadata: dict[str, str] | None = Field(None, max_length=16)
    """Comes back as it was sent."""
    stream: bool | None = None
    """Answer with server-sent events."""
    stream_options: StreamOptions | None = None
    """Only together with `stream`."""
    return_progress: bool | None = None
    """Tell in a stream how much of the prompt is computed, in `prompt_progress` of chunks that come
    before the answer."""
    user: str | None = None
    """Written to the log at debug level."""
    safety_identifier: Hint | None = None
    """The same; a hint by which OpenAI tells users apart."""
    prompt_cache_key: Hint | None = None
    """A hint, which prompts begin alike. Prefixes are found without it; `usage.cache` tells how
    many requests had the same key."""
    prompt_cache_retention: Literal["in_memory", "in-memory", "24h"] | None = None
    """A hint without effect, as `x-warning` says: what is cached stays while there is room."""
    priority: int | None = Field(None, ge=MIN_PRIORITY, le=MAX_PRIORITY)
    """Higher numbers go first among the requests of one API key."""

    @model_validator(mode="after")
    def _options_need_a_stream(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise refuse("only together with `stream: true`", "stream_options")
        if self.return_progress and not self.stream:
            raise refuse("only together with `stream: true`", "return_progress")
        return self

    @model_validator(mode="after")
    def _something_is_left_of_the_prompt(self) -> Self:
        if self.truncate_prompt_tokens == 0:
            raise refuse("0 leaves nothing; -1 or at least 1", "truncate_prompt_tokens")
        return self

    @model_validator(mode="after")
    def _prompt_logprobs_are_no_stream(self) -> Self:
        if self.prompt_logprobs is not None and self.stream:
            raise refuse("not together with `stream: true`", "prompt_logprobs")
        return self

    @model_validator(mode="after")
    def _no_tokens_need_a_reason(self) -> Self:
        if self.max_tokens == 0 and self.prompt_logprobs is None and not self.is_echoed:
            raise refuse(
                "0 is possible together with `prompt_logprobs` only, and with `echo: true` of "
                "completions",
                "max_tokens",
            )
        return self

    @property
    def is_echoed(self) -> bool:
        return False

    @property
    def num_choices(self) -> int:
        return self.n or 1

    @property
    def num_logprobs(self) -> int | None:
        """Alternatives to name beside each token; None where no logprobs are asked for."""
        raise NotImplementedError

    @property
    def wants_usage(self) -> bool:
        """Tells whether a stream is to end with a chunk for the usage."""
        options = self.stream_options
        is_asked = options is not None and options.include_usage
        return bool(is_asked or self.timings or self.explain_cache)


class TextPart(Body):
    """One part of a message's content."""

    model_config = ConfigDict(extra="allow")

    type: Literal["text"]
    """Other types than text are refused."""
    text: str
    """The text. A chat template that reads parts gets them, another one joined by line breaks."""


class ChatMessage(Body):
    not_done = fields.MESSAGE
    rules: ClassVar = {
        "anyOf": [
            {"required": ["content"], "properties": {"content": {"not": {"type": "null"}}}},
            {"properties": {"role": {"const": "assistant"}}},
        ]
    }

    role: Literal["system", "developer", "user", "assistant", "tool"]
    """Who says it; a template sees `developer` as `system`."""
    content: Annotated[
        str | list[dict[str, str]] | None,
        BeforeValidator(_content, json_schema_input_type=str | list[str | TextPart] | None),
    ] = None
    """What is said; null only of an assistant, which may have thought or called only."""
    name: str | None = None
    """Name of the speaker, or of the tool that was called, where the template reads it."""
    tool_calls: list[ToolCall] | None = None
    """What an assistant called; an empty list is none."""
    tool_call_id: str | None = None
    """The call that a `tool` message answers."""
    reasoning_content: str | None = None
    """What an assistant thought, where the template reads it."""
    reasoning: str | None = None
    """The same, by another name that clients have for it."""
    prefix: bool | None = None
    """true on the last message, an assistant's: the answer goes on where it ends."""

    @model_validator(mode="after")
    def _has_content(self) -> Self:
        if self.tool_calls and self.role != "assistant":
            raise refuse("only an assistant calls tools", "tool_calls")
        if self.content is None and self.role != "assistant":
            raise refuse("a string or a list of text parts is required", "content")
        return self

    @property
    def can_be_continued(self) -> bool:
        return self.role == "assistant" and not self.tool_calls

    def said(self) -> dict[str, Any]:
        """Returns the fields that were given, each by one name."""
        found: dict[str, Any] = self.model_dump(exclude_none=True)
        found.pop("prefix", None)
        thought = found.pop("reasoning", None) or ""
        if thought and not found.get("reasoning_content"):
            found["reasoning_content"] = thought
        return found


def check_continued(
    messages: Sequence[ChatMessage], continues: bool | None, adds_generation_prompt: bool | None
) -> None:
    """Raises what `refuse` makes where the last message cannot be continued, or is not to be."""
    if any(message.prefix for message in messages[:-1]):
        raise refuse("`prefix: true` is possible on the last message only", "messages")
    if not messages or not (continues or messages[-1].prefix):
        return
    if continues is False:
        raise refuse("not together with `prefix: true`", "continue_final_message")
    if not messages[-1].can_be_continued:
        raise refuse("only an assistant's text can be continued", "messages")
    if adds_generation_prompt:
        raise refuse("not together with a message that is continued", "add_generation_prompt")


class ChatRequest(Sampling):
    not_done = fields.CHAT

    messages: list[ChatMessage] = Field(min_length=1)
    """The conversation."""
    add_generation_prompt: bool | None = None
    """End the prompt where the assistant speaks. Default: true, but where a message is
    continued."""
    continue_final_message: bool | None = None
    """Go on where the last message, an assistant's, ends; the answer has what is new."""
    chat_template: str | None = Field(None, min_length=1, max_length=MAX_TEMPLATE_CHARS)
    """A jinja template instead of the model's; only with --trust-request-chat-template."""
    max_completion_tokens: Count | None = None
    """The same as max_tokens, and goes before it."""
    chat_template_kwargs: dict[str, Any] | None = None
    """Variables of the model's chat template, such as `enable_thinking`."""
    reasoning_effort: Effort | None = None
    """How much to think, a hint: a model that has no measure for it answers as always, and the
    header `x-warning` says so."""
    thinking_budget: int | None = Field(None, ge=-1)
    """Most tokens of reasoning; then its end is forced and the answer begins. -1 is off."""
    thinking_token_budget: int | None = Field(None, ge=-1)
    """The same, by vLLM's name."""
    thinking_budget_tokens: int | None = Field(None, ge=-1)
    """The same, by llama.cpp's name."""
    tools: list[Tool] | None = Field(None, max_length=512)
    """Functions that the model may call."""
    tool_choice: str | dict[str, Any] | None = None
    """`auto` (the default) or `none`."""
    parallel_tool_calls: bool | None = None
    """false ends the answer after one call."""
    logprobs: bool | None = None
    """Tell the log probability of each token of the answer."""
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    """So many of the likeliest tokens at each place; only together with `logprobs`."""
    stop_in_reasoning: bool | None = None
    """Let the texts of `stop` end the answer within its reasoning too."""
    include_reasoning: bool | None = None
    """false: leave the reasoning out of the answer; it is counted. Default true."""

    @model_validator(mode="after")
    def _can_be_continued(self) -> Self:
        check_continued(self.messages, self.continue_final_message, self.add_generation_prompt)
        return self

    @property
    def continues(self) -> bool:
        return bool(self.continue_final_message or self.messages[-1].prefix)

    @model_validator(mode="after")
    def _alternatives_need_logprobs(self) -> Self:
        if self.top_logprobs and not self.logprobs:
            raise refuse("only together with `logprobs: true`", "top_logprobs")
        return self

    @model_validator(mode="after")
    def _has_one_budget(self) -> Self:
        if len(self._thinking_budgets) > 1:
            raise refuse("given more than once, with different values", "thinking_budget")
        return self

    @property
    def _thinking_budgets(self) -> set[int]:
        names = (self.thinking_budget, self.thinking_token_budget, self.thinking_budget_tokens)
        return {budget for budget in names if budget is not None}

    @property
    def max_thinking_tokens(self) -> int | None:
        """None where the reasoning is not bounded."""
        return next((budget for budget in self._thinking_budgets if budget >= 0), None)

    @property
    def num_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None


class CompletionRequest(Sampling):
    not_done = fields.COMPLETION

    prompt: Annotated[Prompts, BeforeValidator(_prompts, json_schema_input_type=GivenPrompts)]
    """A text, a list of texts, token ids, or a list of lists of token ids."""
    echo: bool | None = None
    """Begin the text with the prompt, and the logprobs with the prompt's."""
    suffix: str | None = None
    """Text after the place to fill, for models that have tokens for it."""
    logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    """Tell log probabilities, and so many of the likeliest tokens at each place."""

    @property
    def is_echoed(self) -> bool:
        return bool(self.echo)

    @property
    def num_logprobs(self) -> int | None:
        return self.logprobs


def parse_chat(body: Mapping[str, Any]) -> ChatRequest:
    given = known_messages(_without_empty(known_fields(ChatRequest, body)))
    return validate(ChatRequest, _known_stream_options(given))


def parse_completion(body: Mapping[str, Any]) -> CompletionRequest:
    return validate(CompletionRequest, _known_stream_options(known_fields(CompletionRequest, body)))


def known_fields(kind: type[Body], given: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    """The fields that are done. Raises InvalidRequestError naming any other."""
    return fields.supported(given, kind.model_fields, kind.not_done, path)


def known_messages(given: dict[str, Any]) -> dict[str, Any]:
    messages = given.get("messages")
    if isinstance(messages, list):
        given["messages"] = [
            _known_message(m, f"messages[{i}].") if isinstance(m, dict) else m
            for i, m in enumerate(messages)
        ]
    return given


def _known_message(given: dict[str, Any], path: str) -> dict[str, Any]:
    """What an assistant refused to say is what it said."""
    if given.get("content") is None and isinstance(given.get("refusal"), str):
        given = {**given, "content": given["refusal"]}
    return fields.supported(
        given, ChatMessage.model_fields, ChatMessage.not_done, path, fields.LEFT_OUT_OF_MESSAGES
    )


def _without_empty(given: dict[str, Any]) -> dict[str, Any]:
    """An empty list of tools is none, and then there is nothing to choose automatically."""
    if given.get("tools") != []:
        return given
    is_auto = given.get("tool_choice") == "auto"
    left_out = {"tools", "tool_choice"} if is_auto else {"tools"}
    return {name: value for name, value in given.items() if name not in left_out}


def _known_stream_options(given: dict[str, Any]) -> dict[str, Any]:
    options = given.get("stream_options")
    if isinstance(options, dict):
        given["stream_options"] = known_fields(StreamOptions, options, "stream_options.")
    return given


def validate(kind: type[RequestBody], given: Mapping[str, Any]) -> RequestBody:
    try:
        return kind.model_validate(given)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        field = first.get("ctx", {}).get("field", "")
        message, param = first["msg"], _field_path((*first["loc"], *([field] if field else [])))
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
