"""Tokens of one sequence → the deltas that its client gets."""

from __future__ import annotations

from collections.abc import Sequence

from mlx_lm_server.parsing.message import MessageDelta
from mlx_lm_server.parsing.message_parser import MessageParser
from mlx_lm_server.protocol import FinishReason, TokenLogprobs
from mlx_lm_server.server.generate_request import (
    AnswerReason,
    Delta,
    GenerateRequest,
    ScoredToken,
)
from mlx_lm_server.server.output_processor import OutputProcessor
from mlx_lm_server.server.tokenizer import Tokenizer


class AnswerReader:
    """Text, then what the text says. Pure and per sequence."""

    __slots__ = (
        "_echo",
        "_echo_logprobs",
        "_index",
        "_is_one_call",
        "_is_prompt_only",
        "_parser",
        "_prompt_ids",
        "_prompt_logprobs",
        "_scores_end_token",
        "_text",
        "num_reasoning_tokens",
    )

    def __init__(self, index: int, request: GenerateRequest, tokenizer: Tokenizer) -> None:
        self._index = index
        self._text = OutputProcessor(
            tokenizer.detokenizer(request.marker_ids),
            request.stop_strings,
            request.sampling.stop_token_ids,
            request.sampling.min_tokens,
        )
        self._parser = MessageParser(request.answer) if request.answer is not None else None
        self._is_one_call = request.is_one_call
        self._is_prompt_only = request.is_prompt_only
        self._echo = request.echo
        self._prompt_ids = request.prompt_ids
        self._echo_logprobs = None if request.echo is None else request.sampling.logprobs
        self._prompt_logprobs = request.prompt_logprobs
        self._scores_end_token = request.scores_end_token
        self.num_reasoning_tokens = 0

    @property
    def num_tokens(self) -> int:
        return 0 if self._is_prompt_only else self._text.num_tokens

    @property
    def tells_reasoning(self) -> bool:
        return self._parser is not None and self._parser.knows_reasoning

    def read(self, ids: Sequence[int], reason: FinishReason | None) -> Delta | None:
        """None where nothing is certain yet."""
        if self._is_prompt_only:
            return Delta(self._index, self._echo or "", "length")
        if self._parser is not None:
            return self._read_message(self._parser, ids, reason)
        if self._echo is not None:
            return self._read_echoed(ids, reason)
        text, reason = self._text.push(ids, reason)
        return Delta(self._index, text, reason) if text or reason is not None else None

    def read_scored(
        self,
        ids: Sequence[int],
        reason: FinishReason | None,
        scores: Sequence[TokenLogprobs],
        prompt_scores: Sequence[TokenLogprobs] | None,
    ) -> Delta | None:
        """The same, with the logprobs of the tokens that are part of the answer."""
        num_before = self._text.num_tokens
        delta = self.read(ids, reason)
        num_read = 0 if self._is_prompt_only else self._text.num_tokens - num_before
        pairs = list(zip(ids, scores, strict=False))[:num_read]
        if pairs and not self._scores_end_token and self._text.is_stop_token(pairs[-1][0]):
            pairs.pop()
        tokens = [ScoredToken(token_id, score) for token_id, score in pairs]
        if prompt_scores is not None:
            echoed = self._prompt_tokens(prompt_scores, self._echo_logprobs)
            tokens = [*(echoed or ()), *tokens]
        if tokens:
            delta = delta or Delta(self._index, "")
            delta.tokens = tokens
        if prompt_scores is not None and self._prompt_logprobs is not None:
            delta = delta or Delta(self._index, "")
            delta.prompt_tokens = self._prompt_tokens(prompt_scores, self._prompt_logprobs)
        return delta

    def _prompt_tokens(
        self, scores: Sequence[TokenLogprobs], num_top: int | None
    ) -> list[ScoredToken] | None:
        """With so many alternatives at most; None where none were asked for."""
        if num_top is None:
            return None
        first, *rest = self._prompt_ids
        pairs = zip(rest, scores, strict=True)
        return [ScoredToken(first, None), *(ScoredToken(i, _cut(s, num_top)) for i, s in pairs)]

    def _read_echoed(self, ids: Sequence[int], reason: FinishReason | None) -> Delta | None:
        text, self._echo = self._echo or "", None
        more, reason = self._text.push(ids, reason)
        return Delta(self._index, text + more, reason)

    def _read_message(
        self, parser: MessageParser, ids: Sequence[int], reason: FinishReason | None
    ) -> Delta | None:
        """Token by token, since each counts as reasoning or not."""
        steps = [(ids[i : i + 1], None) for i in range(len(ids) - 1)]
        content, message, end = "", MessageDelta(), None
        for step_ids, step_reason in [*steps, (ids[-1:], reason)]:
            end = self._step(parser, step_ids, step_reason, message)
            if end is not None:
                break
        content, message.content = message.content, ""
        if not message:
            return Delta(self._index, content, end) if content or end is not None else None
        return Delta(self._index, content, end, message)

    def _step(
        self,
        parser: MessageParser,
        ids: Sequence[int],
        reason: FinishReason | None,
        message: MessageDelta,
    ) -> AnswerReason | None:
        was_reasoning = parser.is_reasoning
        text, end = self._text.push(ids, reason)
        message.add(parser.push(text))
        if was_reasoning or parser.is_reasoning:
            self.num_reasoning_tokens += len(ids)
        if self._is_one_call and parser.num_calls:
            return "tool_calls"
        if end is None:
            return None
        message.add(parser.flush(is_cut=end == "length"))
        return "tool_calls" if end == "stop" and parser.num_calls else end


def _cut(scores: TokenLogprobs, num_top: int) -> TokenLogprobs:
    if len(scores.top_ids) <= num_top:
        return scores
    return TokenLogprobs(
        scores.logprob, scores.top_ids[:num_top], scores.top_logprobs[:num_top], scores.rank
    )
