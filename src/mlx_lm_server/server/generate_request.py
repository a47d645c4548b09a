"""What every protocol's adapter makes of a request, and what every protocol streams from."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from mlx_lm_server.parsing.message import MessageDelta
from mlx_lm_server.parsing.message_parser import AnswerFormat
from mlx_lm_server.protocol import FinishReason, SamplingParams, TokenLogprobs
from mlx_lm_server.server.cache_explanation import CacheExplanation

AnswerReason = FinishReason | Literal["tool_calls"]


@dataclass(frozen=True, slots=True)
class GenerateRequest:
    """One sequence to generate; checked against all limits, nothing left to default.

    `answer` says how the text is to be taken apart; None leaves it whole. `marker_ids` are special
    tokens that are part of the text for that reason. The text begins with `echo`, and holds nothing
    else where `is_prompt_only`. `prompt_logprobs` is how many alternatives to tell of each token of
    the prompt. `is_one_call` ends it after one tool call. `is_copy`: the prompt
    was counted with another sequence. `scores_end_token`: the token that ends the answer has
    logprobs too, though no text. `warnings` say which hints of the request have no effect.
    """

    prompt_ids: list[int]
    sampling: SamplingParams
    stop_strings: tuple[str, ...] = ()
    priority: int = 0
    client_key: str = ""
    cache_salt: str = ""
    answer: AnswerFormat | None = None
    marker_ids: frozenset[int] = frozenset()
    is_one_call: bool = False
    echo: str | None = None
    is_prompt_only: bool = False
    prompt_logprobs: int | None = None
    is_copy: bool = False
    scores_end_token: bool = False
    wants_progress: bool = False
    warnings: tuple[str, ...] = ()


@dataclass(slots=True)
class ScoredToken:
    """A token and its logprobs; the first token of a prompt has none."""

    token_id: int
    scores: TokenLogprobs | None


@dataclass(slots=True)
class PromptProgress:
    """How many tokens of the prompt of one sequence are computed, and how many in all."""

    num_computed: int
    num_prompt: int
    num_cached: int
    elapsed_s: float


@dataclass(slots=True)
class Delta:
    """New text of sequence `index`, and its end where `finish_reason` is set. `message` has what is
    not plain text, `tokens` the tokens since the last delta where logprobs were asked for,
    `prompt_tokens` those of the prompt, once, where theirs were. `progress` comes alone."""

    index: int
    text: str
    finish_reason: AnswerReason | None = None
    message: MessageDelta | None = None
    tokens: list[ScoredToken] | None = None
    prompt_tokens: list[ScoredToken] | None = None
    progress: PromptProgress | None = None

    @property
    def is_plain(self) -> bool:
        return self.message is None and self.tokens is None


@dataclass(slots=True)
class Answer:
    """All deltas of one sequence."""

    text: str = ""
    reasoning: str = ""
    calls: list[list[str]] = field(default_factory=list)  # [id, name, arguments]
    warnings: list[str] = field(default_factory=list)
    tokens: list[ScoredToken] = field(default_factory=list)
    prompt_tokens: list[ScoredToken] | None = None
    finish_reason: AnswerReason = "error"
    _texts: list[str] = field(default_factory=list)

    def add(self, delta: Delta) -> None:
        self._texts.append(delta.text)
        if delta.message is not None:
            self._add_message(delta.message)
        if delta.tokens is not None:
            self.tokens += delta.tokens
        if delta.prompt_tokens is not None:
            self.prompt_tokens = delta.prompt_tokens
        if delta.finish_reason is not None:
            self.finish_reason = delta.finish_reason
            self.text = "".join(self._texts)

    def _add_message(self, message: MessageDelta) -> None:
        self.reasoning += message.reasoning
        self.warnings += message.warnings
        for call in message.calls:
            if call.id is not None and call.name is not None:
                self.calls.append([call.id, call.name, ""])
            self.calls[-1][2] += call.arguments
        if message.broken_call is not None:  # its text is content
            self.calls.pop()


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
    reasoning is not told apart."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    reasoning_tokens: int | None = None
    timings: Timings | None = None
    cache: list[CacheExplanation] | None = None
