"""Tokens of sequences on their way from an engine, or one after another, to who reads them."""

from __future__ import annotations

import asyncio

from mlx_lm_server.errors import ServerError
from mlx_lm_server.protocol import (
    CacheReport,
    FinishReason,
    RequestOutput,
    TokenLogprobs,
)
from mlx_lm_server.server.answers.generate_request import GenerateRequest


class Mailbox:
    """Wakes the one reader of some streams when any of them has something new."""

    __slots__ = ("_loop", "_ready", "_waiter")

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._ready: list[OutputStream] = []
        self._waiter: asyncio.Future[None] | None = None

    def put(self, stream: OutputStream) -> None:
        if not stream.is_in_mailbox:
            stream.is_in_mailbox = True
            self._ready.append(stream)
        waiter = self._waiter
        if waiter is not None and not waiter.done():
            waiter.set_result(None)

    async def take(self) -> list[OutputStream]:
        """Streams with something new, at least one."""
        if not self._ready:
            self._waiter = self._loop.create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        ready, self._ready = self._ready, []
        for stream in ready:
            stream.is_in_mailbox = False
        return ready


class OutputStream:
    """Tokens of one sequence on their way from its engine to their reader.

    It outlives its engine: `output_ids` are all that were told, so that the next engine goes on
    behind them. `is_in_engine` says whether an engine has it, `has_moved` whether that one gave it
    a token. `num_suspected` is how often an engine has died of it, perhaps, since its last token.
    `progress_s` is when it last came further: what its time limits count from.
    """

    __slots__ = (
        "_lost_s",
        "_mailbox",
        "_num_lost_preemptions",
        "_num_read",
        "_num_told",
        "_prompt_scores",
        "_scores",
        "arrival_s",
        "cache",
        "error",
        "finish_reason",
        "first_token_s",
        "has_moved",
        "index",
        "is_ended",
        "is_in_engine",
        "is_in_mailbox",
        "is_released",
        "last_token_s",
        "num_computed_tokens",
        "num_preemptions",
        "num_resumed",
        "num_reused_tokens",
        "num_suspected",
        "output_ids",
        "prefill_s",
        "progress_s",
        "queue_s",
        "req_id",
        "request",
    )

    def __init__(
        self, req_id: str, index: int, request: GenerateRequest, mailbox: Mailbox, arrival_s: float
    ) -> None:
        self.req_id = req_id
        self.index = index
        self.request = request
        self.output_ids: list[int] = []
        self.cache: CacheReport | None = None
        self.num_computed_tokens = 0
        self.num_reused_tokens = 0
        self.arrival_s = arrival_s
        self.first_token_s: float | None = None
        self.last_token_s = self.progress_s = arrival_s
        self.finish_reason: FinishReason | None = None
        self.error: ServerError | None = None
        self.is_ended = False
        self.is_in_engine = False
        self.is_in_mailbox = False
        self.is_released = False
        self.has_moved = False
        self.num_resumed = 0
        self.num_suspected = 0
        self._mailbox = mailbox
        self._lost_s: float | None = None  # when its engine died
        self._num_read = 0
        self._num_told = 0
        self._num_lost_preemptions = 0
        self._scores: list[TokenLogprobs] = []
        self._prompt_scores: list[TokenLogprobs] | None = None
        self.queue_s = 0.0
        self.prefill_s = 0.0
        self.num_preemptions = 0

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.request.prompt_ids)

    @property
    def num_cached_tokens(self) -> int:
        return self.cache.num_cached_tokens if self.cache else 0

    @property
    def has_scores(self) -> bool:
        return bool(self._scores) or self._prompt_scores is not None

    def read_scores(self) -> tuple[list[TokenLogprobs], list[TokenLogprobs] | None]:
        """Logprobs of the tokens read last, and of the prompt, once."""
        scores, self._scores = self._scores, []
        prompt_scores, self._prompt_scores = self._prompt_scores, None
        return scores, prompt_scores

    @property
    def num_unread(self) -> int:
        return len(self.output_ids) - self._num_read

    # ---- engines come and go

    def enter_engine(self, now: float) -> None:
        """Takes note that an engine is given the sequence. The time without one does not count."""
        if self._lost_s is not None:
            self.progress_s += now - self._lost_s
            self._lost_s = None
            self.num_resumed += 1
        else:
            self.progress_s = now
        self.is_in_engine = True
        self.has_moved = False

    def leave_engine(self, now: float) -> None:
        """Takes note that its engine has died."""
        self._lost_s = now
        self.is_in_engine = False
        self._num_lost_preemptions = self.num_preemptions

    def feed(self, output: RequestOutput, now: float) -> None:
        self.output_ids += output.token_ids
        self.last_token_s = self.progress_s = now
        if output.token_ids:
            self.has_moved = True
            self.num_suspected = 0
        if output.cache is not None:
            self.cache = output.cache
        if output.queue_s:
            self.queue_s = output.queue_s
        if output.prefill_s:
            self.prefill_s = output.prefill_s
        self.num_preemptions = self._num_lost_preemptions + output.num_preemptions
        if output.logprobs is not None:
            self._scores += output.logprobs
        if output.prompt_logprobs is not None:
            self._prompt_scores = output.prompt_logprobs
        if output.finish_reason is not None:
            self.finish_reason = output.finish_reason
            self.is_ended = True
        self._mailbox.put(self)

    def note_progress(self, num_computed_tokens: int, num_reused_tokens: int, now: float) -> None:
        """Takes note of how far the engine is with what it has to compute first; who asked for that
        is told, unless it was so far before, with another engine."""
        self.progress_s = now
        if self.request.wants_progress and num_computed_tokens > self._num_told:
            self._num_told = num_computed_tokens
            self.num_computed_tokens = num_computed_tokens
            self.num_reused_tokens = num_reused_tokens
            self._mailbox.put(self)

    def read_progress(self) -> int:
        """Returns how many tokens of the prompt are computed; 0 where that is no news."""
        num_computed_tokens, self.num_computed_tokens = self.num_computed_tokens, 0
        return num_computed_tokens

    def fail(self, error: ServerError) -> None:
        """Ends the stream with an error, unless it has ended."""
        if not self.is_ended:
            self.is_ended = True
            self.error = error
            self._mailbox.put(self)

    def read(self) -> tuple[list[int], FinishReason | None]:
        """Tokens since the last read. Raises the stream's error once they are read."""
        ids = self.output_ids[self._num_read :]
        self._num_read += len(ids)
        if self.error is not None and not ids:
            raise self.error
        if self.error is not None:
            self._mailbox.put(self)
        return ids, self.finish_reason
