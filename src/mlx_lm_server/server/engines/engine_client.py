"""Requests in an engine and the streams of tokens that come back.

Everything here runs on the event loop. One frame from the engine wakes each HTTP request that has
tokens in it once: its streams share a `Mailbox`. A stream ends exactly once, by its engine's final
output, by an error, or by being cancelled; the engine's row lives on until the engine says so, and
until then the stream counts as live.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence

from mlx_lm_server.errors import (
    EngineError,
    EngineUnavailableError,
    OverloadedError,
    RequestTimeoutError,
    ServerError,
)
from mlx_lm_server.protocol import (
    Abort,
    AddRequest,
    CacheReport,
    EngineStats,
    FinishReason,
    Message,
    Outputs,
    RequestOutput,
    SamplingParams,
    TokenLogprobs,
)
from mlx_lm_server.server.answers.generate_request import GenerateRequest
from mlx_lm_server.server.engines.metrics import Metrics

# Messages at whose ends a conversation is likely to go on differently.
NUM_LAST_MESSAGE_ENDS = 3
# Tokens that may wait for a client that reads slowly, before its request is given up.
MAX_UNREAD_TOKENS = 16384


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
    """Tokens of one sequence on their way from the engine to their reader."""

    __slots__ = (
        "_mailbox",
        "_prompt_scores",
        "_scores",
        "_unread",
        "arrival_s",
        "cache",
        "error",
        "finish_reason",
        "first_token_s",
        "index",
        "is_ended",
        "is_in_mailbox",
        "is_released",
        "last_token_s",
        "num_computed_tokens",
        "num_preemptions",
        "num_prompt_tokens",
        "num_reused_tokens",
        "prefill_s",
        "queue_s",
        "req_id",
    )

    def __init__(
        self, req_id: str, index: int, num_prompt_tokens: int, mailbox: Mailbox, now: float
    ) -> None:
        self.req_id = req_id
        self.index = index
        self.num_prompt_tokens = num_prompt_tokens
        self.cache: CacheReport | None = None
        self.num_computed_tokens = 0
        self.num_reused_tokens = 0
        self.arrival_s = now
        self.first_token_s: float | None = None
        self.last_token_s = now
        self.finish_reason: FinishReason | None = None
        self.error: ServerError | None = None
        self.is_ended = False
        self.is_in_mailbox = False
        self.is_released = False
        self._mailbox = mailbox
        self._unread: list[int] = []
        self._scores: list[TokenLogprobs] = []
        self._prompt_scores: list[TokenLogprobs] | None = None
        self.queue_s = 0.0
        self.prefill_s = 0.0
        self.num_preemptions = 0

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
        return len(self._unread)

    def feed(self, output: RequestOutput, now: float) -> None:
        self._unread += output.token_ids
        self.last_token_s = now
        if output.cache is not None:
            self.cache = output.cache
        if output.queue_s:
            self.queue_s = output.queue_s
        if output.prefill_s:
            self.prefill_s = output.prefill_s
        self.num_preemptions = output.num_preemptions
        if output.logprobs is not None:
            self._scores += output.logprobs
        if output.prompt_logprobs is not None:
            self._prompt_scores = output.prompt_logprobs
        if output.finish_reason is not None:
            self.finish_reason = output.finish_reason
            self.is_ended = True
        self._mailbox.put(self)

    def note_progress(self, num_computed_tokens: int, num_reused_tokens: int) -> None:
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
        ids, self._unread = self._unread, []
        if self.error is not None and not ids:
            raise self.error
        if self.error is not None:
            self._mailbox.put(self)
        return ids, self.finish_reason


class EngineClient:
    """The requests of one engine; the supervisor attaches it when it is ready and detaches it when
    it is dead."""

    def __init__(
        self,
        metrics: Metrics,
        *,
        first_token_timeout_s: float,
        token_timeout_s: float,
        on_row_end: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._metrics = metrics
        self._first_token_timeout_s = first_token_timeout_s
        self._token_timeout_s = token_timeout_s
        self._on_row_end = on_row_end
        self._send: Callable[[Message], None] | None = None
        self._live: dict[str, OutputStream] = {}
        self._clock = clock
        self.stats: EngineStats | None = None

    @property
    def num_live(self) -> int:
        return len(self._live)

    def attach(self, send: Callable[[Message], None]) -> None:
        self._send = send

    def detach(self, error: EngineError) -> None:
        """The engine is gone: every stream in it ends with `error`."""
        self._send = None
        self.stats = None
        self.fail_all(error)
        self._live.clear()

    def fail_all(self, error: ServerError) -> None:
        for stream in self._live.values():
            stream.fail(error)

    def submit(
        self,
        request_id: str,
        requests: Sequence[GenerateRequest],
        mailbox: Mailbox,
        arrival_s: float,
    ) -> list[OutputStream]:
        """Hands sequences to the engine. Raises EngineUnavailableError."""
        if self._send is None:
            raise EngineUnavailableError("the engine is not ready; try again in a moment")
        streams = []
        for index, request in enumerate(requests):
            req_id = f"{request_id}-{index}"
            stream = OutputStream(req_id, index, len(request.prompt_ids), mailbox, arrival_s)
            stream.last_token_s = self._clock()
            self._live[req_id] = stream
            streams.append(stream)
            self._send(
                AddRequest(
                    req_id=req_id,
                    prompt_ids=request.prompt_ids,
                    sampling=request.sampling,
                    priority=request.priority,
                    client_key=request.client_key,
                    cache_salt=request.cache_salt,
                    message_ends=_message_ends(request.prompt_ids, request.sampling),
                    wants_progress=request.wants_progress,
                )
            )
        return streams

    def abort(self, stream: OutputStream, error: ServerError) -> None:
        """Ends the stream now and tells the engine; nothing where it has ended already."""
        if stream.is_ended:
            return
        stream.fail(error)
        self.release(stream)

    def release(self, stream: OutputStream) -> None:
        """Frees the engine's row, once, where the reader needs no more of it."""
        if self._send is not None and stream.req_id in self._live and not stream.is_released:
            stream.is_released = True
            self._send(Abort(stream.req_id))

    def on_outputs(self, frame: Outputs) -> None:
        """Hands one step's tokens to their streams."""
        now = self._clock()
        self.stats = frame.stats
        self._metrics.observe_steps(frame.step_tokens)
        for output in frame.outputs:
            stream = self._live.get(output.req_id)
            if stream is None:
                continue
            if output.finish_reason is not None:
                del self._live[output.req_id]
                self._on_row_end()
            if not stream.is_ended:
                self._deliver(stream, output, now)

    def _deliver(self, stream: OutputStream, output: RequestOutput, now: float) -> None:
        if output.num_computed_tokens:  # no token: the time to the first one runs on
            stream.note_progress(output.num_computed_tokens, output.num_reused_tokens)
            return
        if output.token_ids:
            self._metrics.observe_tokens(stream, len(output.token_ids), now)
            if output.cache is not None:
                self._metrics.observe_cache(output.cache)
            if stream.first_token_s is None:
                self._metrics.observe_start(output)
                stream.first_token_s = now
        if output.finish_reason == "error":
            stream.fail(EngineError(output.error or "the engine could not do this request"))
        elif output.finish_reason == "abort":
            stream.fail(EngineError(output.error or "the engine ended this request"))
        else:
            stream.feed(output, now)
            if stream.num_unread > MAX_UNREAD_TOKENS:
                self.abort(stream, OverloadedError("the client reads too slowly", retry_after_s=1))

    def expire(self, now: float) -> None:
        """Ends the streams that have waited too long for a token."""
        for stream in list(self._live.values()):
            if stream.is_ended:
                continue
            is_first = stream.first_token_s is None
            limit_s = self._first_token_timeout_s if is_first else self._token_timeout_s
            if limit_s and now - stream.last_token_s > limit_s:
                kind = "first" if is_first else "further"
                self.abort(stream, RequestTimeoutError(f"no {kind} token within {limit_s:g} s"))


def _message_ends(prompt_ids: Sequence[int], sampling: SamplingParams) -> list[int]:
    """Positions after the tokens that end a message: the first, which ends the system message, and
    the last ones, since templates change what comes after them in the next turn."""
    ends = [i + 1 for i, token in enumerate(prompt_ids) if token in sampling.stop_token_ids]
    return sorted({*ends[:1], *ends[-NUM_LAST_MESSAGE_ENDS:]})
