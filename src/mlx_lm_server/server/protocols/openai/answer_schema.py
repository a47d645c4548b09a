"""What the OpenAI endpoints answer, for /openapi.json. Answers are not built from these classes;
tests hold real ones against them."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict


class Part(BaseModel):
    """Base of all parts of answers: nothing is sent that does not stand here."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)


class ErrorObject(Part):
    message: str
    """What is wrong, with the field, the limit and the numbers."""
    type: str
    """Kind of error."""
    param: str | None
    """The field at fault."""
    code: str | None
    """The reason, for programs."""


class ErrorAnswer(Part):
    """Body of every answer whose status is 400 or more, and event of a stream that fails."""

    error: ErrorObject
    """What happened."""


class PromptTokensDetails(Part):
    cached_tokens: int
    """Prompt tokens that were not computed anew."""


class CompletionTokensDetails(Part):
    reasoning_tokens: int
    """Tokens of the answer that were thought."""


class TimingsPart(Part):
    queue_s: float
    """Seconds in the queue."""
    ttft_s: float
    """Seconds from the arrival to the first token."""
    total_s: float
    """Seconds from the arrival to the last token."""
    prefill_tokens_per_s: float
    """Pace of the prompt."""
    decode_tokens_per_s: float
    """Pace of the answer."""


class CacheExplanationPart(Part):
    prompt_tokens: int
    """Length of the prompt."""
    cached_tokens: int
    """Tokens that were not computed anew."""
    from_running_requests: int
    """How many of them came from requests in flight."""
    nearest_tokens: int
    """Up to where the prompt was equal to the nearest cached text."""
    prompt_text: str | None
    """How the prompt goes on there; null where nothing is near, or keys keep clients apart."""
    nearest_text: str | None
    """How the cached text goes on there."""
    why: str
    """What kept the rest from being found; empty where nothing did."""
    recompute_s: float
    """Forecast of the seconds that computing the rest takes on an idle machine."""
    prompt_cache_key: str | None
    """That of the request."""
    requests_with_key: int
    """How many earlier requests of the client had the same."""


class CacheExplanationAnswer(Part):
    id: str
    """Of the answer."""
    object: Literal["cache.explanation"]
    """Kind of answer."""
    prompts: list[CacheExplanationPart]
    """One for each prompt of the request."""


class UsagePart(Part):
    prompt_tokens: int
    """Tokens of the prompts; several choices count it once."""
    completion_tokens: int
    """Tokens of all choices."""
    total_tokens: int
    """Both together."""
    prompt_tokens_details: PromptTokensDetails
    """More on the prompt."""
    completion_tokens_details: CompletionTokensDetails | None = None
    """Where the model's reasoning is told apart."""
    timings: TimingsPart | None = None
    """Where `timings` asked for it."""
    cache: list[CacheExplanationPart] | None = None
    """Where `explain_cache` asked for it."""
    resumed: int | None = None
    """Where an engine died meanwhile: how often another one took the answer up again. Computed in
    bfloat16, or on a GPU, it may be another answer from there on than it would have been."""


class TopLogprob(Part):
    token: str
    """Text of the token."""
    logprob: float
    """Natural logarithm of the probability that the model gave it."""
    bytes: list[int]
    """Bytes of the token, which may be half a character."""


class TokenLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]
    """The likeliest tokens there."""


class ChatLogprobs(Part):
    content: list[TokenLogprob]
    """One entry for each token, reasoning and calls too; up to where the text ends."""
    refusal: None
    """Always null."""


class CompletionLogprobsPart(Part):
    tokens: list[str]
    """Texts of the tokens."""
    token_logprobs: list[float | None]
    """Null for the first token of an echoed prompt."""
    top_logprobs: list[dict[str, float] | None]
    """The likeliest tokens at each place, and the one that was drawn."""
    text_offset: list[int]
    """Where in the text each token begins."""


class PromptLogprob(Part):
    logprob: float
    """Natural logarithm of the probability that the model gave it there."""
    rank: int
    """Its place among all tokens, from 1 on."""
    decoded_token: str
    """Its text."""


PromptLogprobs = list[dict[str, PromptLogprob] | None]


class CalledFunction(Part):
    name: str
    """Which tool."""
    arguments: str
    """JSON text."""


class CallOfTool(Part):
    id: str
    """To be sent back in `tool_call_id`."""
    type: Literal["function"]
    """Always `function`."""
    function: CalledFunction
    """What is called."""


class AnswerMessage(Part):
    role: Literal["assistant"]
    """Always `assistant`."""
    content: str | None
    """Null where there are only calls or reasoning."""
    refusal: None
    """Always null."""
    reasoning_content: str | None = None
    """What the model thought."""
    tool_calls: list[CallOfTool] | None = None
    """What it calls."""
    warning: str | None = None
    """What could not be parsed and is content therefore."""


FinishReasonText = Literal["stop", "length", "tool_calls"]


class ChatChoice(Part):
    index: int
    """Number of the choice."""
    message: AnswerMessage
    """The answer."""
    logprobs: ChatLogprobs | None
    """Where they were asked for."""
    finish_reason: FinishReasonText
    """Why it ended."""
    stop_reason: str | int | None
    """The text of `stop` or the token of `stop_token_ids` that ended it."""
    token_ids: list[int] | None = None
    """All tokens that were generated, where they were asked for."""


class _Headed(Part):
    id: str
    """Name of this answer."""
    created: int
    """Unix time."""
    model: str
    """As the request named it."""
    metadata: dict[str, str] | None = None
    """That of the request."""


class ChatCompletion(_Headed):
    object: Literal["chat.completion"]
    """Kind of answer."""
    choices: list[ChatChoice]
    """`n` of them."""
    prompt_logprobs: PromptLogprobs | None = None
    """By token id, of each token of the prompt; null for the first."""
    prompt_token_ids: list[int] | None = None
    """The prompt as the model got it, where it was asked for."""
    usage: UsagePart
    """Numbers of tokens."""


class FunctionPiece(Part):
    name: str | None = None
    """With the first piece of a call."""
    arguments: str
    """More of the JSON text."""


class CallPiece(Part):
    index: int
    """Number of the call."""
    id: str | None = None
    """With its first piece."""
    type: Literal["function"] | None = None
    """With its first piece."""
    function: FunctionPiece
    """What is new."""


class MessagePiece(Part):
    role: Literal["assistant"] | None = None
    """In the first chunk of a choice."""
    content: str | None = None
    """More of the answer."""
    reasoning_content: str | None = None
    """More of what the model thinks."""
    tool_calls: list[CallPiece] | None = None
    """More of its calls."""
    warning: str | None = None
    """What could not be parsed and is content therefore."""


class ChatChunkChoice(Part):
    index: int
    """Number of the choice."""
    delta: MessagePiece
    """What is new."""
    logprobs: ChatLogprobs | None
    """Of the tokens since the last chunk."""
    finish_reason: FinishReasonText | None
    """In the last chunk of a choice."""
    stop_reason: str | int | None = None
    """In the last chunk: the text of `stop` or the token of `stop_token_ids` that ended it."""
    token_ids: list[int] | None = None
    """Those since the last chunk, where they were asked for."""
    resumed: int | None = None
    """In the last chunk, as in `usage`."""


class PromptProgressPart(Part):
    index: int
    """Number of the choice."""
    total: int
    """Tokens of its prompt."""
    cache: int
    """Those that were not computed anew."""
    processed: int
    """Those that are computed."""
    time_ms: int
    """Since the request arrived."""


class ChatCompletionChunk(_Headed):
    """An event of a stream; the last one is `[DONE]`."""

    object: Literal["chat.completion.chunk"]
    """Kind of answer."""
    choices: list[ChatChunkChoice]
    """One, or none beside the usage."""
    prompt_token_ids: list[int] | None = None
    """In the first chunk, where it was asked for: the prompt as the model got it."""
    usage: UsagePart | None = None
    """In the last chunk, where it was asked for."""
    prompt_progress: PromptProgressPart | None = None
    """In chunks without choices before the answer, where `return_progress` asked for it."""


class TextChoice(Part):
    index: int
    """Number of the choice; `n` for the first prompt, then those of the next one."""
    text: str
    """The answer, or what is new of it."""
    logprobs: CompletionLogprobsPart | None
    """Where they were asked for."""
    finish_reason: FinishReasonText | None
    """Why it ended; null in a chunk before the last."""
    stop_reason: str | int | None = None
    """The text of `stop` or the token of `stop_token_ids` that ended it; not in a chunk before the
    last."""
    token_ids: list[int] | None = None
    """All tokens that were generated, or those since the last chunk, where they were asked for."""
    prompt_token_ids: list[int] | None = None
    """The prompt as the model got it, where it was asked for; once in a stream."""
    prompt_logprobs: PromptLogprobs | None = None
    """By token id, of each token of the prompt; null for the first."""
    resumed: int | None = None
    """In the last chunk of a stream, as in `usage`."""


class Completion(_Headed):
    """The whole answer, and each event of a stream."""

    object: Literal["text_completion"]
    """Kind of answer."""
    choices: list[TextChoice]
    """`n` for each prompt."""
    usage: UsagePart | None = None
    """Numbers of tokens; in a stream with the last chunk, where it was asked for."""
    prompt_progress: PromptProgressPart | None = None
    """In chunks without choices before the answer, where `return_progress` asked for it."""


class ModelCard(Part):
    id: str
    """A name that requests may use."""
    object: Literal["model"]
    """Kind of answer."""
    created: int
    """Unix time of the server's start."""
    owned_by: str
    """This server."""
    root: str
    """What was given as --model."""
    max_model_len: int | None
    """Tokens that prompt and answer of a request may have together; null while it loads."""


class ModelList(Part):
    object: Literal["list"]
    """Kind of answer."""
    data: list[ModelCard]
    """One for each name."""


class TokenPiece(Part):
    id: int
    """Id."""
    piece: str | list[int]
    """Its text; half a character is the list of its bytes."""


class TokenizeAnswer(Part):
    count: int
    """Number of tokens."""
    max_model_len: int
    """Tokens that prompt and answer of a request may have together."""
    tokens: list[int] | list[TokenPiece]
    """Ids, or, where `with_pieces` asked for it, objects."""
    token_strs: list[str | None] | None = None
    """As the vocabulary writes them, where they were asked for."""


class DetokenizeAnswer(Part):
    prompt: str
    """The text."""
    content: str
    """The same, by llama.cpp's name."""


class ApplyTemplateAnswer(Part):
    prompt: str
    """The rendered conversation."""
