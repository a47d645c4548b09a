"""Requests in an engine and the streams of tokens that come back.

Everything here runs on the event loop. One frame from the engine wakes each HTTP request that has
tokens in it once: its streams share a `Mailbox`. A stream ends exactly once, by its engine's final
output, by an error, or by being cancelled; the engine's row lives on until the engine says so, and
until then the stream counts as live.

A stream outlives its engine: the next one is given its prompt and the tokens that were told.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from mlx_lm_server.errors import (
    EngineDiedError,
    EngineError,
    EngineUnavailableError,
    OverloadedError,
    RequestKillsEngineError,
    RequestTimeoutError,
    ServerError,
)
from mlx_lm_server.protocol import (
    Abort,
    AddRequest,
    EngineStats,
    Message,
    Outputs,
    RequestOutput,
    SamplingParams,
)
from mlx_lm_server.server.answers.generate_request import GenerateRequest
from mlx_lm_server.server.engines.metrics import Metrics
from mlx_lm_server.server.engines.output_stream import Mailbox, OutputStream
from mlx_lm_server.server.engines.trials import Trials

# Messages at whose ends a conversation is likely to go on differently.
NUM_LAST_MESSAGE_ENDS = 3
# Tokens that may wait for a client that reads slowly, before its request is given up.
MAX_UNREAD_TOKENS = 16384


@dataclass(frozen=True, slots=True)
class Inquest:
    """What is known of a death. `made_tokens`: the engine gave tokens before it. `leads_on`: the
    next one will be given fewer suspects, so it is no reason to give up."""

    made_tokens: bool
    leads_on: bool


class EngineClient:
    """The requests of one engine after another; the supervisor attaches each when it is ready and
    detaches it when it is dead."""

    def __init__(
        self,
        metrics: Metrics,
        *,
        first_token_timeout_s: float,
        token_timeout_s: float,
        resumes: bool = True,
        on_row_end: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._metrics = metrics
        self._first_token_timeout_s = first_token_timeout_s
        self._token_timeout_s = token_timeout_s
        self._resumes = resumes
        self._on_row_end = on_row_end
        self._send: Callable[[Message], None] | None = None
        self._live: dict[str, OutputStream] = {}
        self._trials = Trials()
        self._is_coming = False  # the next engine
        self._has_made_tokens = False
        self._clock = clock
        self.stats: EngineStats | None = None

    @property
    def num_live(self) -> int:
        return len(self._live)

    def attach(self, send: Callable[[Message], None]) -> None:
        """An engine is ready: it is given what the one before has not finished."""
        self._send = send
        self._has_made_tokens = False
        self._hand_over()

    def detach(self, how: str, rows_under_way: Collection[str] | None = None) -> Inquest:
        """The engine is gone, which ended in such a way while these rows were computed; None where
        that is not known. Who is found guilty fails, all others wait for the next engine."""
        now = self._clock()
        self._send = None
        self._metrics.keep_totals(self.stats)
        self.stats = None
        for stream in [stream for stream in self._live.values() if stream.is_ended]:
            self._forget(stream)
        if not self._resumes:
            self.give_up(EngineDiedError("the engine ended while it worked on this request"))
            return Inquest(self._has_made_tokens, leads_on=False)
        self._is_coming = True
        in_engine = [stream for stream in self._live.values() if stream.is_in_engine]
        suspects = [stream for stream in in_engine if stream.req_id in (rows_under_way or ())]
        guilty = self._trials.open(suspects or in_engine)
        for stream in in_engine:
            stream.leave_engine(now)
        if guilty is not None:
            self._forget(guilty)
            guilty.fail(
                RequestKillsEngineError(f"the engine ended each time it computed this ({how})")
            )
        return Inquest(self._has_made_tokens, leads_on=bool(in_engine) and guilty is None)

    def give_up(self, error: ServerError) -> None:
        """No engine will come: every stream ends with `error`."""
        self._is_coming = False
        self._send = None
        for stream in list(self._live.values()):
            stream.fail(error)
        self._live.clear()

    def submit(
        self,
        request_id: str,
        requests: Sequence[GenerateRequest],
        mailbox: Mailbox,
        arrival_s: float,
    ) -> list[OutputStream]:
        """Hands sequences to the engine, or to the next one while that is started anew. Raises
        EngineUnavailableError."""
        if self._send is None and not self._is_coming:
            raise EngineUnavailableError("the engine is not ready; try again in a moment")
        streams = []
        for index, request in enumerate(requests):
            stream = OutputStream(f"{request_id}-{index}", index, request, mailbox, arrival_s)
            self._live[stream.req_id] = stream
            streams.append(stream)
        self._hand_over()
        return streams

    def _hand_over(self) -> None:
        """Gives the engine whom it may have now."""
        if self._send is None:
            return
        group = self._trials.next_group()
        if self._trials.are_over:
            group = [stream for stream in self._live.values() if not stream.is_in_engine]
        now = self._clock()
        for stream in group:
            stream.enter_engine(now)
            self._metrics.resumed_requests += stream.num_resumed > 0
            self._send(_message_of(stream))

    def _forget(self, stream: OutputStream) -> None:
        """A stream gives its place back."""
        del self._live[stream.req_id]
        self._on_row_end()

    def abort(self, stream: OutputStream, error: ServerError) -> None:
        """Ends the stream now and tells the engine; nothing where it has ended already."""
        if stream.is_ended:
            return
        stream.fail(error)
        self.release(stream)

    def release(self, stream: OutputStream) -> None:
        """Frees the engine's row, once, where the reader needs no more of it."""
        if stream.req_id not in self._live or stream.is_released:
            return
        stream.is_released = True
        if self._send is None or not stream.is_in_engine:
            self._forget(stream)
        else:
            self._send(Abort(stream.req_id))
        if not self._trials.are_over:
            self._hand_over()

    def on_outputs(self, frame: Outputs) -> None:
        """Hands one step's tokens to their streams."""
        now = self._clock()
        self.stats = frame.stats
        self._metrics.observe_steps(frame.step_tokens)
        for output in frame.outputs:
            stream = self._live.get(output.req_id)
            if stream is None:
                continue
            if output.token_ids:
                self._has_made_tokens = True
            if output.finish_reason is not None:
                self._forget(stream)
            if not stream.is_ended:
                self._deliver(stream, output, now)
        if not self._trials.are_over:
            self._hand_over()

    def _deliver(self, stream: OutputStream, output: RequestOutput, now: float) -> None:
        if output.num_computed_tokens:
            stream.note_progress(output.num_computed_tokens, output.num_reused_tokens, now)
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
        """Ends the streams that have waited too long: for their first token while their prompts got
        no further, or for another one. Time without an engine does not count."""
        for stream in list(self._live.values()):
            if stream.is_ended or not stream.is_in_engine:
                continue
            is_first = stream.first_token_s is None
            limit_s = self._first_token_timeout_s if is_first else self._token_timeout_s
            if limit_s and now - stream.progress_s > limit_s:
                kind = "first" if is_first else "further"
                self.abort(stream, RequestTimeoutError(f"no {kind} token within {limit_s:g} s"))


def _message_of(stream: OutputStream) -> AddRequest:
    """Returns what an engine is told of a sequence."""
    request = stream.request
    return AddRequest(
        req_id=stream.req_id,
        prompt_ids=request.prompt_ids,
        sampling=request.sampling,
        priority=request.priority,
        client_key=request.client_key,
        cache_salt=request.cache_salt,
        message_ends=_message_ends(request.prompt_ids, request.sampling),
        wants_progress=request.wants_progress,
        output_ids=stream.output_ids,
    )


def _message_ends(prompt_ids: Sequence[int], sampling: SamplingParams) -> list[int]:
    """Positions after the tokens that end a message: the first, which ends the system message, and
    the last ones, since templates change what comes after them in the next turn."""
    ends = [i + 1 for i, token in enumerate(prompt_ids) if token in sampling.stop_token_ids]
    return sorted({*ends[:1], *ends[-NUM_LAST_MESSAGE_ENDS:]})
