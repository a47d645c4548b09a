"""How long a step takes, learnt while serving.

    step_s = base + per_prefill_token · prefill_tokens + per_row · rows
           + per_kv_token · kv_tokens + per_prefill_pair · prefill_pairs

Recursive least squares on the relative error, with directional forgetting (Kulhavý and Kárný
1984): what the last steps say nothing about, such as prefill during an hour of decoding, is not
forgotten. Residuals are clipped at a few times their running scale (Huber), so that one stall moves
a forecast by little, while a lasting change widens the scale and is followed. No cost is negative.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

from mlx_lm_server.core.plan import PrefillChunk, StepPlan

FORGETTING = 0.99
INITIAL_VARIANCE = 50.0
INITIAL_SCALE = 0.2
MIN_SCALE, MAX_SCALE = 0.02, 2.0
SCALE_GROWTH = 1.05
CLIP_AT_SCALES = 3.0
MIN_STEP_S = 1e-6


class StepFeatures(NamedTuple):
    """What a step's time depends on. `kv_tokens` is what the decoding rows attend to, and
    `prefill_pairs` the same summed over the prefill tokens."""

    prefill_tokens: int = 0
    rows: int = 0
    kv_tokens: int = 0
    prefill_pairs: float = 0.0

    @classmethod
    def of(cls, plan: StepPlan) -> StepFeatures:
        return cls(
            prefill_tokens=plan.num_prefill_tokens,
            rows=len(plan.decodes),
            kv_tokens=sum(decode.position + 1 for decode in plan.decodes),
            prefill_pairs=sum(_pairs_of(chunk) for chunk in plan.prefills),
        )

    def with_chunk(self, start: int, num_tokens: int) -> StepFeatures:
        """This step and one more prefill chunk."""
        return self._replace(
            prefill_tokens=self.prefill_tokens + num_tokens,
            prefill_pairs=self.prefill_pairs + prefill_pairs(start, num_tokens),
        )


def prefill_pairs(start: int, num_tokens: int) -> float:
    """How many (query, key) pairs a chunk has that starts after `start` tokens."""
    return num_tokens * start + num_tokens * (num_tokens + 1) / 2


def _pairs_of(chunk: PrefillChunk) -> float:
    return prefill_pairs(chunk.start, len(chunk.token_ids))


@dataclass(frozen=True, slots=True)
class StepCosts:
    """Seconds per step and per unit of each feature; measured at start-up, then learnt."""

    base_s: float = 0.005
    per_prefill_token_s: float = 0.0005
    per_row_s: float = 0.0005
    per_kv_token_s: float = 5e-7
    per_prefill_pair_s: float = 5e-7

    def as_list(self) -> list[float]:
        return [
            self.base_s,
            self.per_prefill_token_s,
            self.per_row_s,
            self.per_kv_token_s,
            self.per_prefill_pair_s,
        ]


def _learning_units(costs: StepCosts) -> list[float]:
    """The initial costs, none of them zero: coefficients are learnt as multiples of these."""
    token_s = max(costs.per_prefill_token_s, 1e-7)
    row_s = max(costs.per_row_s, token_s / 10)
    floors = [token_s, token_s, row_s, row_s / 5000, token_s / 5000]
    return [max(cost, floor) for cost, floor in zip(costs.as_list(), floors, strict=True)]


class CostModel:
    """Forecasts step times and learns from measured ones. Owned by the scheduler."""

    def __init__(self, initial: StepCosts | None = None) -> None:
        initial = initial or StepCosts()
        self._costs = initial.as_list()
        self._units = _learning_units(initial)
        size = len(self._costs)
        self._covariance = [
            [INITIAL_VARIANCE if i == j else 0.0 for j in range(size)] for i in range(size)
        ]
        self._residual_scale = INITIAL_SCALE

    @property
    def costs(self) -> StepCosts:
        return StepCosts(*self._costs)

    def forecast_s(self, features: StepFeatures) -> float:
        base_s, *per_unit = self._costs
        total = base_s + sum(c * x for c, x in zip(per_unit, features, strict=True))
        return max(MIN_STEP_S, total)

    def observe(self, features: StepFeatures, step_s: float) -> None:
        """Learn from a step that took `step_s` seconds."""
        if not (math.isfinite(step_s) and step_s > 0):
            return
        forecast = self.forecast_s(features)
        residual = step_s / forecast - 1
        clipped = self._clip(residual)
        trust = clipped / residual if residual else 1.0
        inputs = [
            unit * x / forecast for unit, x in zip(self._units, (1.0, *features), strict=True)
        ]
        self._learn(inputs, clipped, trust)

    def max_prefill_tokens(
        self,
        goal_s: float,
        rows: int,
        kv_tokens: int,
        context: int,
        others: StepFeatures | None = None,
    ) -> int:
        """The longest chunk after `context` tokens that keeps the step within `goal_s` seconds,
        beside `rows` decoding rows over `kv_tokens` tokens and the prefill in `others`."""
        features = (others or StepFeatures())._replace(rows=rows, kv_tokens=kv_tokens)
        return self.max_chunk_tokens(goal_s - self.forecast_s(features), context)

    def max_chunk_tokens(self, slack_s: float, context: int) -> int:
        """The longest chunk after `context` tokens that adds at most `slack_s` seconds: the root
        of per_pair / 2 · n² + (per_token + per_pair · (context + 1/2)) · n = slack_s."""
        if slack_s <= 0:
            return 0
        _, per_token, _, _, per_pair = self._costs
        linear = max(per_token + per_pair * (context + 0.5), 1e-12)
        return int(2 * slack_s / (linear + math.sqrt(linear * linear + 2 * per_pair * slack_s)))

    def prefill_tokens_per_s(self, chunk_tokens: int) -> float:
        """Prompt throughput in chunks of this size, alone."""
        step = StepFeatures().with_chunk(0, chunk_tokens)
        return chunk_tokens / self.forecast_s(step)

    def decode_tokens_per_s(self, rows: int, kv_tokens: int) -> float:
        """Output throughput of so many rows, without prefill beside them."""
        return rows / self.forecast_s(StepFeatures(rows=rows, kv_tokens=kv_tokens))

    def _clip(self, residual: float) -> float:
        """Bound the residual and let its scale follow the median of its size."""
        bound = CLIP_AT_SCALES * self._residual_scale
        grows = abs(residual) > self._residual_scale
        scale = self._residual_scale * (SCALE_GROWTH if grows else 1 / SCALE_GROWTH)
        self._residual_scale = min(MAX_SCALE, max(MIN_SCALE, scale))
        return max(-bound, min(bound, residual))

    def _learn(self, inputs: list[float], residual: float, trust: float) -> None:
        """One step of recursive least squares. Clipped observations (`trust` < 1) shrink the
        covariance less: they say that something changed, not by how much."""
        gains = [sum(p * x for p, x in zip(row, inputs, strict=True)) for row in self._covariance]
        gain = sum(g * x for g, x in zip(gains, inputs, strict=True))
        if gain < 1e-12:
            return
        for i, unit in enumerate(self._units):
            cost = self._costs[i] + unit * gains[i] * residual / (1 + gain)
            self._costs[i] = max(0.0, cost)
        shrunk = gain * trust / (FORGETTING + FORGETTING * gain * trust) / trust
        factor = (gain - shrunk) / (gain * gain)
        for i, row in enumerate(self._covariance):
            for j in range(len(row)):
                row[j] -= factor * gains[i] * gains[j]
