"""What every protocol's adapter makes of a request, and what every protocol streams from."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from mlx_lm_server.parsing.message import MessageDelta
from mlx_lm_server.parsing.message_parser import AnswerFormat
from mlx_lm_server.protocol import FinishReason, SamplingParams, TokenLogprobs
from mlx_lm_server.server.answers.cache_explanation import CacheExplanation

AnswerReason = FinishReason | Literal["tool_calls"]
StopReason = str | int | None


@dataclass(frozen=True, slots=True)
class GenerateRequest:
    """One sequence to generate; checked against all limits, nothing left to default.

    `answer` says how the text is to be taken apart; None leaves it whole. `marker_ids` are special
    tokens that have a text. `stop_token_ids` are those of the sampling that the client named.
    `keeps_stop`: what ends the text stays in it; `stops_reasoning`: stop strings end reasoning too.
    `hides_reasoning` leaves it out. The text begins with `echo`, and holds nothing else where
    `is_prompt_only`. `prompt_logprobs` is how many alternatives to tell of each token of the
    prompt. `returns_token_ids` and `returns_prompt_ids` tell the ids of answer and prompt.
    `is_one_call` ends it after one tool call. `is_copy`: the prompt was counted with another
    sequence. `scores_end_token`: the token that ends the answer has logprobs too, though no text.
    `prompt_cache_key` only says which requests a client takes for alike. `warnings` say which hints
    of the request have no effect.
    """

    prompt_ids: list[int]
    sampling: SamplingParams
    stop_strings: tuple[str, ...] = ()
    stop_token_ids: frozenset[int] = frozenset()
    keeps_stop: bool = False
    stops_reasoning: bool = False
    hides_reasoning: bool = False
    priority: int = 0
    client_key: str = ""
    cache_salt: str = ""
    answer: AnswerFormat | None = None
    marker_ids: frozenset[int] = frozenset()
    is_one_call: bool = False
    echo: str | None = None
    is_prompt_only: bool = False
    prompt_logprobs: int | None = None
    returns_token_ids: bool = False
    returns_prompt_ids: bool = False
    is_copy: bool = False
    scores_end_token: bool = False
    wants_progress: bool = False
    prompt_cache_key: str | None = None
    warnings: tuple[str, ...] = ()


@dataclass(slots=True)
class ScoredToken:
    """A token and its logprobs, which the first token of a prompt has none of. `offset` is where in
    the whole text its own begins."""

    token_id: int
    scores: TokenLogprobs | None
    offset: int = 0


@dataclass(slots=True)
class PromptProgress:
    """How many tokens of the prompt of one sequence are computed, and how many in all."""

    num_computed: int
    num_prompt: int
    num_cached: int
    elapsed_s: float


@dataclass(slots=True)
class Delta:
    """New text of sequence `index`, and its end where `finish_reason` is set; `stop_reason` is then
    the stop string or the client's stop token that ended it. `message` has what is not plain text,
    `tokens` the tokens of the text since the last delta where logprobs were asked for (with the end
    always, so that an answer without any has an empty list),
    `prompt_tokens` those of the prompt, once, where theirs were. `token_ids` are those that were
    read since the last delta, `prompt_token_ids` come once; both where they were asked for.
    `progress` comes alone. `num_resumed`, told with the end, is how often an engine took the
    sequence up again after another one's death."""

    index: int
    text: str
    finish_reason: AnswerReason | None = None
    stop_reason: StopReason = None
    message: MessageDelta | None = None
    tokens: list[ScoredToken] | None = None
    prompt_tokens: list[ScoredToken] | None = None
    token_ids: list[int] | None = None
    prompt_token_ids: list[int] | None = None
    progress: PromptProgress | None = None
    num_resumed: int = 0

    @property
    def is_plain(self) -> bool:
        return self.message is None and not self.tokens and self.token_ids is None

    @property
    def is_empty(self) -> bool:
        """Tells whether the delta says nothing at all."""
        has_end_or_text = self.finish_reason is not None or bool(self.text)
        has_prompt = self.prompt_tokens is not None or self.prompt_token_ids is not None
        return not has_end_or_text and not has_prompt and self.is_plain


@dataclass(slots=True)
class Answer:
    """All deltas of one sequence."""

    text: str = ""
    reasoning: str = ""
    warnings: list[str] = field(default_factory=list)
    tokens: list[ScoredToken] | None = None
    prompt_tokens: list[ScoredToken] | None = None
    token_ids: list[int] | None = None
    prompt_token_ids: list[int] | None = None
    finish_reason: AnswerReason = "error"
    stop_reason: StopReason = None
    _texts: list[str] = field(default_factory=list)
    _begun: dict[int, list[str]] = field(default_factory=dict)

    def add(self, delta: Delta) -> None:
        self._texts.append(delta.text)
        if delta.message is not None:
            self._add_message(delta.message)
        if delta.tokens is not None:
            self.tokens = self.tokens or []
            self.tokens += delta.tokens
        if delta.prompt_tokens is not None:
            self.prompt_tokens = delta.prompt_tokens
        if delta.token_ids is not None:
            self.token_ids = [*(self.token_ids or ()), *delta.token_ids]
        if delta.prompt_token_ids is not None:
            self.prompt_token_ids = delta.prompt_token_ids
        if delta.finish_reason is not None:
            self.finish_reason = delta.finish_reason
            self.stop_reason = delta.stop_reason
            self.text = "".join(self._texts)

    def _add_message(self, message: MessageDelta) -> None:
        self.reasoning += message.reasoning
        self.warnings += message.warnings
        for call in message.calls:
            if call.id is not None and call.name is not None:
                self._begun[call.index] = [call.id, call.name, ""]
            self._begun[call.index][2] += call.arguments
        for index in message.broken_calls:  # their text is content
            del self._begun[index]

    @property
    def calls(self) -> list[list[str]]:
        """Id, name and arguments of each call."""
        return list(self._begun.values())


@dataclass(frozen=True, slots=True)
class Timings:
    """Seconds from the arrival, and the pace of one HTTP request."""

    queue_s: float
    ttft_s: float
    total_s: float
    prefill_tokens_per_s: float
    decode_tokens_per_s: float


@dataclass(slots=True)
class Usage:
    """Tokens of all sequences of one HTTP request; `reasoning_tokens` None where the model's
    reasoning is not told apart. `num_resumed` is how often it was taken up again after an engine's
    death, at most by one of them."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    reasoning_tokens: int | None = None
    timings: Timings | None = None
    cache: list[CacheExplanation] | None = None
    num_resumed: int = 0
