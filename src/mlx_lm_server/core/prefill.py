"""How many prompt tokens a step takes, and whose: chunked prefill without stalls.

While rows decode, the step may take as long as the ITL goal; the cost model says how many prefill
tokens that allows (Sarathi-Serve, Agrawal et al. 2024, with time in place of a token count). They
are shared so that a short prompt does not wait behind a long one and a long one always goes on:
the oldest prompt gets a quarter, the rest goes to the prompts with the least left.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mlx_lm_server.core.cost_model import CostModel, StepFeatures
from mlx_lm_server.core.request import Request
from mlx_lm_server.errors import ConfigError

OLDEST_PROMPT_SHARE = 0.25
MIN_GOAL_FACTOR = 1.5
MAX_TAIL_SHARE = 0.25


@dataclass(frozen=True, slots=True)
class SchedulerLimits:
    """Bounds on a step. None means that only the other bounds hold.

    `max_num_batched_tokens` bounds decode and prefill tokens of a step together,
    `prefill_batch_size` the prompts in it and `prefill_step_size` the tokens of each.
    `itl_goal_s` is how long a step with decoding rows may take, where that leaves prefill at least
    a third of the step; without it the goal is `auto_goal_factor` times the step without prefill,
    at least `auto_goal_floor_s`, and `short_prompt_factor` times that for prompts of at most
    `short_prompt_tokens`. A chunk has at least `min_chunk_tokens`, whatever the goal. A row gets
    room for `lookahead_tokens` of its answer when it joins.
    """

    max_batch_size: int = 32
    max_num_batched_tokens: int = 2048
    prefill_step_size: int | None = None
    prefill_batch_size: int | None = None
    itl_goal_s: float | None = None
    auto_goal_factor: float = 2.6
    auto_goal_floor_s: float = 0.03
    short_prompt_tokens: int = 256
    short_prompt_factor: float = 1.5
    min_chunk_tokens: int = 4
    lookahead_tokens: int = 256

    def __post_init__(self) -> None:
        if self.max_batch_size < 1:
            raise ConfigError(f"max_batch_size must be at least 1, not {self.max_batch_size}")
        if self.max_num_batched_tokens < self.max_batch_size:
            raise ConfigError(
                f"max_num_batched_tokens ({self.max_num_batched_tokens}) must be at least "
                f"max_batch_size ({self.max_batch_size}): each decoding row needs one token a step"
            )

    def step_goal_s(self, decode_step_s: float, *, is_short: bool) -> float:
        """How long a step may take whose decode part takes `decode_step_s`."""
        if self.itl_goal_s is not None:
            return max(self.itl_goal_s, MIN_GOAL_FACTOR * decode_step_s)
        goal_s = max(self.auto_goal_floor_s, self.auto_goal_factor * decode_step_s)
        return goal_s * self.short_prompt_factor if is_short else goal_s


class PrefillPlan:
    """The prefill chunks of one step as they are granted. Lives within one `schedule` call."""

    def __init__(
        self, limits: SchedulerLimits, cost_model: CostModel, decode: StepFeatures
    ) -> None:
        self._limits = limits
        self._cost_model = cost_model
        self._decode = decode
        self._decode_step_s = cost_model.forecast_s(decode)
        self._tokens_left = limits.max_num_batched_tokens - decode.rows
        self._granted: dict[Request, int] = {}

    def share_out(self, prefilling: Sequence[Request]) -> list[tuple[Request, int]]:
        """Token counts per request; `prefilling` comes with the most urgent first."""
        if not prefilling:
            return []
        oldest, *others = self._chosen(prefilling)
        self._grant(oldest, OLDEST_PROMPT_SHARE if others else 1.0)
        for request in sorted([oldest, *others], key=_least_left_first):
            self._grant(request, 1.0)
        return list(self._granted.items())

    def _chosen(self, prefilling: Sequence[Request]) -> list[Request]:
        """The oldest and those with the least left, within `prefill_batch_size`."""
        oldest, *others = prefilling
        if self._limits.prefill_batch_size is None:
            return [oldest, *others]
        others.sort(key=_least_left_first)
        return [oldest, *others[: self._limits.prefill_batch_size - 1]]

    def _grant(self, request: Request, share: float) -> None:
        """Let the request have up to this share of what the step has left."""
        had = self._granted.get(request, 0)
        most = self._most_tokens(request, had)
        num_tokens = min(most, int(share * self._tokens_left), self._affordable(request, share))
        if num_tokens < self._limits.min_chunk_tokens:
            num_tokens = 0 if self._granted else min(most, self._limits.min_chunk_tokens)
        if self._is_short(request) and most - num_tokens <= MAX_TAIL_SHARE * (had + num_tokens):
            num_tokens = most
        if num_tokens > 0:
            self._granted[request] = had + num_tokens
            self._tokens_left -= num_tokens

    def _most_tokens(self, request: Request, had: int) -> int:
        left = request.num_prefill_tokens_left
        chunk = min(left, self._limits.prefill_step_size or left)
        return min(chunk - had, self._tokens_left)

    def _affordable(self, request: Request, share: float) -> int:
        """Tokens that keep the step within its goal; unbounded where nobody decodes."""
        if self._decode.rows == 0:
            return self._tokens_left
        goal_s = self._limits.step_goal_s(self._decode_step_s, is_short=self._is_short(request))
        slack_s = share * (goal_s - self._cost_model.forecast_s(self._features()))
        context = request.num_computed_tokens + self._granted.get(request, 0)
        return self._cost_model.max_chunk_tokens(slack_s, context)

    def _is_short(self, request: Request) -> bool:
        return request.prefill_until <= self._limits.short_prompt_tokens

    def _features(self) -> StepFeatures:
        features = self._decode
        for request, num_tokens in self._granted.items():
            features = features.with_chunk(request.num_computed_tokens, num_tokens)
        return features


def _least_left_first(request: Request) -> tuple[int, int, int]:
    return (-request.priority, request.num_prefill_tokens_left, request.arrival_order)
