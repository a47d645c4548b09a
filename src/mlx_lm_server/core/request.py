"""One request on its way through the engine.

tokens      prompt prompt prompt | out out out | pending
            └────── num_known_tokens ──────┘     planned or drawn, not read yet
            └──────────────── num_tokens ─────────────┘
            └── num_computed_tokens ──┘          may reach into what is pending

The scheduler owns it. While a plan is made, the prefix cache writes how far its row is computed,
and the departures take its row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum, auto

from mlx_lm_server.protocol import AddRequest, FinishReason, SamplingParams


class RequestStatus(Enum):
    WAITING = auto()  # in the queue, or for the tier; never had a row
    RUNNING = auto()  # has a row
    PREEMPTED = auto()  # in the queue again; computes anew what the cache has not kept
    DRAINING = auto()  # its last token is planned and its row leaves, the token not read yet
    FINISHED = auto()  # it has ended; its row may still be leaving


@dataclass(slots=True, eq=False)
class Request:
    """A request and how far it is.

    `max_new_tokens` is `sampling.max_tokens`, or less where memory ends before. `prefill_until` is
    how many tokens were known when it got its row: below it the row prefills, from it on it
    decodes tokens that it sampled itself. `arrival_order` counts requests as they come.
    `num_pending_tokens` is how many tokens the plans that are not read yet give at most.

    What the prefix cache knows of it is the cache's (chain.py): `cache_salt` and `message_ends`
    are what the client said for that.
    """

    req_id: str
    prompt_ids: tuple[int, ...]
    sampling: SamplingParams
    priority: int = 0
    client_key: str = ""
    arrival_s: float = 0.0
    arrival_order: int = 0
    max_new_tokens: int = 0
    status: RequestStatus = RequestStatus.WAITING
    output_ids: list[int] = field(default_factory=list)
    row: int | None = None
    num_computed_tokens: int = 0
    num_pending_tokens: int = 0
    prefill_until: int = 0
    num_preemptions: int = 0
    finish_reason: FinishReason | None = None
    admitted_s: float | None = None
    first_token_s: float | None = None
    cache_salt: str = ""
    message_ends: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        self.max_new_tokens = self.max_new_tokens or self.sampling.max_tokens

    @classmethod
    def from_message(cls, message: AddRequest, arrival_s: float) -> Request:
        """Returns a new request, or one that has lost its row together with its engine."""
        status = RequestStatus.PREEMPTED if message.output_ids else RequestStatus.WAITING
        return cls(
            req_id=message.req_id,
            prompt_ids=tuple(message.prompt_ids),
            sampling=message.sampling,
            priority=message.priority,
            client_key=message.client_key,
            cache_salt=message.cache_salt,
            message_ends=tuple(message.message_ends),
            arrival_s=arrival_s,
            output_ids=list(message.output_ids),
            status=status,
        )

    @property
    def held_row(self) -> int:
        """Its row, of a request that has one."""
        assert self.row is not None, "the request has no row"
        return self.row

    @property
    def num_known_tokens(self) -> int:
        """Prompt and output tokens that the host has read."""
        return len(self.prompt_ids) + len(self.output_ids)

    @property
    def num_tokens(self) -> int:
        return self.num_known_tokens + self.num_pending_tokens

    @property
    def num_tokens_to_plan(self) -> int:
        """How many more tokens may be sampled for it."""
        return self.max_new_tokens - len(self.output_ids) - self.num_pending_tokens

    @property
    def num_prefill_tokens_left(self) -> int:
        return max(0, self.prefill_until - self.num_computed_tokens)

    @property
    def is_prefilling(self) -> bool:
        return self.num_computed_tokens < self.prefill_until

    @property
    def urgency(self) -> tuple[int, int]:
        """Sorts the most urgent first: higher priority number, then earlier arrival."""
        return (-self.priority, self.arrival_order)

    def known_ids(self, start: int, stop: int) -> tuple[int, ...]:
        """Tokens `start` to `stop - 1` of prompt and output."""
        split = len(self.prompt_ids)
        if stop <= split:
            return self.prompt_ids[start:stop]
        output = self.output_ids[max(0, start - split) : stop - split]
        return self.prompt_ids[start:split] + tuple(output)

    @property
    def num_held_tokens(self) -> int:
        """Tokens that are known and computed."""
        return min(self.num_computed_tokens, self.num_known_tokens)

    def num_taken(self, token_ids: Sequence[int]) -> int:
        """Returns how many of these tokens the request takes: up to its end."""
        left = self.max_new_tokens - len(self.output_ids)
        stops = self.sampling.stop_token_ids
        ends = (n for n, token in enumerate(token_ids, 1) if token in stops)
        return min(left, next(ends, len(token_ids)))

    @property
    def reason_to_end(self) -> FinishReason | None:
        """Why the request ends with its last token, if it does."""
        if self.output_ids[-1] in self.sampling.stop_token_ids:
            return "stop"
        if len(self.output_ids) >= self.max_new_tokens:
            return "length"
        return None
