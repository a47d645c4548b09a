"""Tokens of one sequence → the deltas that its client gets."""

from __future__ import annotations

import codecs
from collections.abc import Sequence

from mlx_lm_server.parsing.message import MessageDelta
from mlx_lm_server.parsing.message_parser import MessageParser
from mlx_lm_server.protocol import FinishReason, TokenLogprobs
from mlx_lm_server.server.answers.generate_request import (
    AnswerReason,
    Delta,
    GenerateRequest,
    ScoredToken,
)
from mlx_lm_server.server.answers.message_reader import MessageReader
from mlx_lm_server.server.answers.output_processor import OutputProcessor
from mlx_lm_server.server.models.tokenizer import Tokenizer


class AnswerReader:
    """Text, then what the text says. Pure and per sequence."""

    __slots__ = (
        "_echo",
        "_has_told_prompt",
        "_held",
        "_index",
        "_message",
        "_request",
        "_text",
        "_tokenizer",
        "num_reasoning_tokens",
    )

    def __init__(self, index: int, request: GenerateRequest, tokenizer: Tokenizer) -> None:
        self._index = index
        self._request = request
        self._tokenizer = tokenizer
        answer = request.answer
        self._text = OutputProcessor(
            tokenizer.detokenizer(request.marker_ids),
            request.stop_strings if answer is None else (),
            request.sampling.stop_token_ids,
            request.sampling.min_tokens,
            keeps_stop=request.keeps_stop,
        )
        self._message = MessageReader(MessageParser(answer), request) if answer else None
        self._echo = request.echo
        self._held: list[tuple[int, ScoredToken]] = []  # by where their text begins
        self._has_told_prompt = False
        self.num_reasoning_tokens = 0

    @property
    def num_tokens(self) -> int:
        return 0 if self._request.is_prompt_only else self._text.num_tokens

    @property
    def tells_reasoning(self) -> bool:
        return self._message is not None and self._message.tells_reasoning

    def read(self, ids: Sequence[int], reason: FinishReason | None) -> Delta | None:
        """Returns what is new for the client; None where nothing is certain yet."""
        delta = self._begin()
        if self._request.is_prompt_only:
            delta.finish_reason = "length"
        else:
            self._push(ids, reason, delta)
        return None if delta.is_empty else delta

    def read_scored(
        self,
        ids: Sequence[int],
        reason: FinishReason | None,
        scores: Sequence[TokenLogprobs],
        prompt_scores: Sequence[TokenLogprobs] | None,
    ) -> Delta | None:
        """Does the same as `read`, with the logprobs of the tokens whose text, or a part of it, is
        sent."""
        delta = self._begin()
        tokens = [] if prompt_scores is None else self._read_prompt(prompt_scores, delta)
        if self._request.is_prompt_only:
            delta.finish_reason = "length"
        elif scores:
            self._push_scored(ids, reason, scores, delta)
            tokens += self._take_settled(delta)
        else:
            self._push(ids, reason, delta)
        is_told = bool(tokens) or delta.finish_reason is not None
        if is_told and self._request.sampling.logprobs is not None:
            delta.tokens = tokens
        return None if delta.is_empty else delta

    def _begin(self) -> Delta:
        """Adds what is known of the prompt, once."""
        delta = Delta(self._index, "")
        if not self._has_told_prompt:
            self._has_told_prompt = True
            delta.text = self._echo or ""
            if self._request.returns_prompt_ids:
                delta.prompt_token_ids = self._request.prompt_ids
            if self._request.returns_token_ids:
                delta.token_ids = []
        return delta

    def _push(self, ids: Sequence[int], reason: FinishReason | None, delta: Delta) -> None:
        num_before = self._text.num_tokens
        if self._message is not None:
            self._read_message(self._message, ids, reason, delta)
        else:
            text, end = self._text.push(ids, reason)
            delta.text += text
            if end is not None:
                self._end(end, ids, self._text.stop_string, delta)
        if self._request.returns_token_ids and ids:
            read = ids[: self._text.num_tokens - num_before]
            delta.token_ids = [*(delta.token_ids or ()), *read]

    def _end(
        self, end: AnswerReason, ids: Sequence[int], stop_string: str | None, delta: Delta
    ) -> None:
        delta.finish_reason = end
        if stop_string is not None:
            delta.stop_reason = stop_string
        elif end != "length" and ids and ids[-1] in self._request.stop_token_ids:
            delta.stop_reason = ids[-1]

    def _read_message(
        self,
        message: MessageReader,
        ids: Sequence[int],
        reason: FinishReason | None,
        delta: Delta,
    ) -> None:
        """Reads token by token, since each counts as reasoning or not."""
        said = delta.message or MessageDelta()
        steps = [(ids[i : i + 1], None) for i in range(len(ids) - 1)]
        for step_ids, step_reason in [*steps, (ids[-1:], reason)]:
            self._step(message, step_ids, step_reason, said, delta)
            if delta.finish_reason is not None:
                break
        delta.text += said.content
        said.content = ""
        if self._request.hides_reasoning:
            said.reasoning = ""
        delta.message = said or None

    def _step(
        self,
        message: MessageReader,
        ids: Sequence[int],
        reason: FinishReason | None,
        said: MessageDelta,
        delta: Delta,
    ) -> None:
        was_reasoning = message.is_reasoning
        text, end = self._text.push(ids, reason)
        may_stop = self._text.num_tokens > self._request.sampling.min_tokens
        said.add(message.push(text, may_stop=may_stop))
        if was_reasoning or message.is_reasoning:
            self.num_reasoning_tokens += len(ids)
        if message.stop_string is None and not self._is_called(message) and end is not None:
            said.add(message.flush(is_cut=end == "length", may_stop=may_stop))
        if message.stop_string is not None:
            end = "stop"
        elif self._is_called(message):
            self._end("tool_calls", (), None, delta)
            return
        if end is not None:
            is_call = end == "stop" and message.num_calls > 0
            self._end("tool_calls" if is_call else end, ids, message.stop_string, delta)

    def _is_called(self, message: MessageReader) -> bool:
        return self._request.is_one_call and message.num_calls > 0

    # ---- logprobs

    def _push_scored(
        self,
        ids: Sequence[int],
        reason: FinishReason | None,
        scores: Sequence[TokenLogprobs],
        delta: Delta,
    ) -> None:
        """Reads token by token, so that it is known where the text of each begins."""
        num_echoed = len(self._echo or "")
        for number, (token_id, score) in enumerate(zip(ids, scores, strict=False), 1):
            start = self._text.num_chars
            was_reasoning = self._message is not None and self._message.is_reasoning
            self._push((token_id,), reason if number == len(ids) else None, delta)
            has_text = self._text.num_chars > start
            if not self._is_hidden(token_id, delta, was_reasoning=was_reasoning, has_text=has_text):
                self._held.append((start, ScoredToken(token_id, score, start + num_echoed)))
            if delta.finish_reason is not None:
                return

    def _is_hidden(
        self, token_id: int, delta: Delta, *, was_reasoning: bool, has_text: bool
    ) -> bool:
        """Tells whether a token is one that only ends the answer, or belongs to reasoning that is
        left out: such have no logprobs."""
        request, message = self._request, self._message
        if request.hides_reasoning and message and (was_reasoning or message.is_reasoning):
            return True
        is_end = delta.finish_reason is not None and self._text.is_stop_token(token_id)
        return is_end and not request.scores_end_token and not (request.keeps_stop and has_text)

    def _take_settled(self, delta: Delta) -> list[ScoredToken]:
        """Returns the tokens whose text is sent. Those held back for a stop string come when their
        text does; where it is cut off, never."""
        is_stopped = isinstance(delta.stop_reason, str)
        if self._request.stop_strings and (is_stopped or delta.finish_reason is None):
            end = (self._message or self._text).num_settled
            found = [token for start, token in self._held if start < end]
            self._held = [held for held in self._held if held[0] >= end]
        else:
            found = [token for _, token in self._held]
            self._held = []
        return found

    def _read_prompt(self, scores: Sequence[TokenLogprobs], delta: Delta) -> list[ScoredToken]:
        """Returns the tokens of the prompt that the text begins with, where they are to be
        scored."""
        request = self._request
        if request.prompt_logprobs is not None:
            delta.prompt_tokens = self._prompt_tokens(scores, request.prompt_logprobs)
        if self._echo is None or request.sampling.logprobs is None:
            return []
        found = self._prompt_tokens(scores, request.sampling.logprobs)
        _place(found, self._echo, self._tokenizer)
        return found

    def _prompt_tokens(self, scores: Sequence[TokenLogprobs], num_top: int) -> list[ScoredToken]:
        """Returns logprobs with so many alternatives at most."""
        first, *rest = self._request.prompt_ids
        pairs = zip(rest, scores, strict=True)
        return [ScoredToken(first, None), *(ScoredToken(i, _cut(s, num_top)) for i, s in pairs)]


def _place(tokens: Sequence[ScoredToken], text: str, tokenizer: Tokenizer) -> None:
    """Tells each where it begins in their text. One that a tokenizer put around it has none there,
    and the first word may be without its space."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    place = 0
    for token in tokens:
        token.offset = place
        piece = decoder.decode(tokenizer.bytes_of(token.token_id))
        if text.startswith(piece, place):
            place += len(piece)
        elif piece[:1] == " " and text.startswith(piece[1:], place):
            place += len(piece) - 1


def _cut(scores: TokenLogprobs, num_top: int) -> TokenLogprobs:
    if len(scores.top_ids) <= num_top:
        return scores
    return TokenLogprobs(
        scores.logprob, scores.top_ids[:num_top], scores.top_logprobs[:num_top], scores.rank
    )
