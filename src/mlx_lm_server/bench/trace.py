"""What one request did, as its client saw it."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise


@dataclass(slots=True)
class Trace:
    """Times are seconds of one monotonic clock. Written by the request's connection until
    `ended_at` is set, read only after that.

    A *token event* is a piece of the stream that carries text; a server may put several tokens
    into one. `role` says what the request is for within its
    workload; `http_status` is 0 where no response came.
    """

    role: str
    max_tokens: int
    sent_at: float
    ended_at: float | None = None
    event_times: list[float] = field(default_factory=list)
    text_parts: list[str] = field(default_factory=list)
    prompt_tokens: int | None = None
    cached_tokens: int | None = None
    completion_tokens: int | None = None
    finish_reason: str | None = None
    http_status: int = 0
    error: str | None = None
    was_stopped: bool = False

    @property
    def output_tokens(self) -> int:
        """As the server counts them, else the token events."""
        if self.completion_tokens is not None:
            return self.completion_tokens
        return len(self.event_times)

    @property
    def is_short(self) -> bool:
        """Ended by itself before it had all the tokens that were asked for."""
        is_whole = self.error is None and not self.was_stopped
        return is_whole and self.output_tokens < self.max_tokens

    @property
    def ttft_s(self) -> float | None:
        return self.event_times[0] - self.sent_at if self.event_times else None

    @property
    def e2e_s(self) -> float | None:
        is_whole = self.ended_at is not None and self.error is None and not self.was_stopped
        return self.ended_at - self.sent_at if is_whole and self.ended_at else None

    @property
    def gaps_s(self) -> list[float]:
        """Seconds between one token event and the next."""
        return [after - before for before, after in pairwise(self.event_times)]

    @property
    def text(self) -> str:
        return "".join(self.text_parts)
