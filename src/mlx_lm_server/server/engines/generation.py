"""One HTTP request's way through the engine: submitted, read as text deltas, ended exactly once."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from mlx_lm_server.errors import ClientGoneError, ServerError
from mlx_lm_server.protocol import FinishReason
from mlx_lm_server.server.answers.answer_reader import AnswerReader
from mlx_lm_server.server.answers.cache_explanation import CacheFacts
from mlx_lm_server.server.answers.generate_request import (
    Delta,
    GenerateRequest,
    PromptProgress,
    Timings,
    Usage,
)
from mlx_lm_server.server.engines.engine_client import EngineClient
from mlx_lm_server.server.engines.metrics import Metrics
from mlx_lm_server.server.engines.output_stream import Mailbox, OutputStream
from mlx_lm_server.server.models.tokenizer import Tokenizer


class Generation:
    """One or more sequences of one HTTP request, read by one task."""

    def __init__(
        self,
        request_id: str,
        requests: Sequence[GenerateRequest],
        *,
        client: EngineClient,
        tokenizer: Tokenizer,
        metrics: Metrics,
        arrival_s: float,
        on_done: Callable[[Generation], None],
    ) -> None:
        """Submits at once. Raises EngineUnavailableError."""
        self._client = client
        self._metrics = metrics
        self._on_done = on_done
        self._mailbox = Mailbox()
        self._streams = client.submit(request_id, requests, self._mailbox, arrival_s)
        self._requests = requests
        self._readers = [
            AnswerReader(index, request, tokenizer) for index, request in enumerate(requests)
        ]
        self._prompts = _by_prompt(requests)
        self._num_open = len(requests)
        self._open = [True] * len(requests)
        self.request_id = request_id
        self.num_with_key = 0  # earlier requests of the same prompt_cache_key
        self.finish_reasons: list[FinishReason] = []

    @property
    def is_done(self) -> bool:
        return self._num_open == 0

    async def next(self) -> list[Delta]:
        """What came since the last call, at least one delta unless done.

        Raises what ended the request otherwise; all its sequences are released then.
        """
        deltas: list[Delta] = []
        while not deltas and self._num_open:
            for stream in await self._mailbox.take():
                if self._open[stream.index]:
                    self._read(stream, deltas)
        return deltas

    def _read(self, stream: OutputStream, deltas: list[Delta]) -> None:
        try:
            ids, reason = stream.read()
        except ServerError as error:
            self._close(stream, "abort" if isinstance(error, ClientGoneError) else "error")
            self.close()
            raise
        if num_computed := stream.read_progress():
            deltas.append(self._progress(stream, num_computed))
        if not ids and reason is None:
            return
        reader = self._readers[stream.index]
        if stream.has_scores:
            delta = reader.read_scored(ids, reason, *stream.read_scores())
        else:
            delta = reader.read(ids, reason)
        if delta is None:
            return
        deltas.append(delta)
        if delta.finish_reason is not None:
            end = delta.finish_reason
            delta.num_resumed = stream.num_resumed
            self._close(stream, "stop" if end == "tool_calls" else end)
            if reason is None:  # a stop string or a call: the engine does not know yet
                self._client.release(stream)

    def _progress(self, stream: OutputStream, num_computed: int) -> Delta:
        elapsed_s = time.monotonic() - stream.arrival_s
        progress = PromptProgress(
            num_computed, stream.num_prompt_tokens, stream.num_reused_tokens, elapsed_s
        )
        return Delta(stream.index, "", progress=progress)

    def _close(self, stream: OutputStream, reason: FinishReason) -> None:
        self._open[stream.index] = False
        self._num_open -= 1
        self.finish_reasons.append(reason)
        stream.is_ended = True
        request, num_tokens = self._requests[stream.index], self._readers[stream.index].num_tokens
        self._metrics.observe_end(stream, request, num_tokens, reason)
        if self.is_done:
            for places in self._prompts:
                longest = max(self._readers[place].num_tokens for place in places)
                self._metrics.observe_choices(len(places), longest)
            self._on_done(self)

    def cancel(self, error: ServerError) -> None:
        """Ends what is still open; the reader gets `error`."""
        for stream in self._streams:
            if self._open[stream.index]:
                self._client.abort(stream, error)

    def close(self) -> None:
        """The reader is leaving: what is still open ends without anybody to tell."""
        for stream in self._streams:
            if self._open[stream.index]:
                self._client.abort(stream, ClientGoneError("nobody reads"))
                self._close(stream, "abort")

    def summary(self) -> str:
        """One line for the log."""
        usage, first = self.usage(), self._streams[0]
        ttft_s = (first.first_token_s or first.last_token_s) - first.arrival_s
        total_s = max(stream.last_token_s for stream in self._streams) - first.arrival_s
        return (
            f"{self.request_id} {'/'.join(self.finish_reasons)}: {usage.prompt_tokens} prompt + "
            f"{usage.completion_tokens} new tokens, first {ttft_s:.3f} s, last {total_s:.3f} s"
        )

    @property
    def client_key(self) -> str:
        return self._requests[0].client_key

    @property
    def cache_facts(self) -> CacheFacts:
        """The reports of the prompts that were admitted."""
        pairs = zip(self._streams, self._requests, strict=True)
        reports = [s.cache for s, r in pairs if s.cache is not None and not r.is_copy]
        return CacheFacts(reports, self._requests[0].prompt_cache_key, self.num_with_key)

    def usage(self) -> Usage:
        readers = self._readers
        tells_reasoning = any(reader.tells_reasoning for reader in readers)
        counted = [s for s, r in zip(self._streams, self._requests, strict=True) if not r.is_copy]
        return Usage(
            prompt_tokens=sum(stream.num_prompt_tokens for stream in counted),
            completion_tokens=sum(reader.num_tokens for reader in readers),
            cached_tokens=sum(stream.num_cached_tokens for stream in counted),
            reasoning_tokens=sum(r.num_reasoning_tokens for r in readers)
            if tells_reasoning
            else None,
            num_resumed=max(stream.num_resumed for stream in self._streams),
        )

    def timings(self) -> Timings:
        """Returns the times of all sequences together, as one client sees them."""
        streams, usage = self._streams, self.usage()
        arrival_s = streams[0].arrival_s
        first_s = min(stream.first_token_s or stream.last_token_s for stream in streams)
        last_s = max(stream.last_token_s for stream in streams)
        queue_s = min(stream.queue_s for stream in streams)
        num_prefilled = usage.prompt_tokens - usage.cached_tokens
        num_decoded = usage.completion_tokens - len(streams)
        return Timings(
            queue_s=queue_s,
            ttft_s=first_s - arrival_s,
            total_s=last_s - arrival_s,
            prefill_tokens_per_s=_pace(num_prefilled, first_s - arrival_s - queue_s),
            decode_tokens_per_s=_pace(num_decoded, last_s - first_s),
        )


def _by_prompt(requests: Sequence[GenerateRequest]) -> list[list[int]]:
    """The places of the sequences of each prompt; its copies follow the first."""
    prompts: list[list[int]] = []
    for place, request in enumerate(requests):
        if request.is_copy:
            prompts[-1].append(place)
        else:
            prompts.append([place])
    return prompts


def _pace(num_tokens: int, seconds: float) -> float:
    return num_tokens / seconds if num_tokens > 0 and seconds > 0 else 0.0
