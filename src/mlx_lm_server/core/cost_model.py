"""How long a step takes, learnt while serving.

    step_s = base + per_prefill_token · prefill_tokens + per_row · rows
           + per_kv_token · kv_tokens + per_prefill_pair · prefill_pairs
           + per_copied_token · copied_tokens

Least squares of the relative error with forgetting and no negative cost, solved by warm-started
coordinate descent. Three things keep it sane:

- The regulariser pulls each cost to its present value, with a small constant weight (as in
  leaky, regularised RLS; Gunnarsson 1996). So what the last steps say nothing about, such as
  prefill during an hour of decoding, stays as it was.
- A step that took several times longer or shorter than forecast is believed by a part only (Huber
  weights on the logarithm of the ratio, against its running scale). One stall hardly moves a
  forecast.
- A lasting change widens that scale, and the wider it is, the faster the past is forgotten
  (variable forgetting; Fortescue et al. 1981).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

from mlx_lm_server.core.plan import StepPlan

FORGETTING_PER_SCALE, MAX_FORGETTING = 0.3, 0.3
PRIOR_WEIGHT = 0.1  # in observations
DESCENT_SWEEPS = 3
INITIAL_SCALE = 0.2
MIN_SCALE, MAX_SCALE = 0.02, 3.0
SCALE_GROWTH, SCALE_DECAY = 1.35, 0.93
CLIP_AT_SCALES = 3.0
MIN_STEP_S, MIN_COPIED_TOKEN_S = 1e-6, 1e-9


class StepFeatures(NamedTuple):
    """What a step's time depends on. `kv_tokens` is the K and V that are read, once for each
    decoding row and once for each chunk; `prefill_pairs` is what the prefill tokens attend to, one
    by one; guesses count as a chunk after their row's token. Without the reading, a chunk over a
    long context costs several milliseconds that do not shrink with it; a model that knows nothing
    of them takes them for a cost of decoding. `copied_tokens` are those whose K and V rows are
    given before the forward."""

    prefill_tokens: int = 0
    rows: int = 0
    kv_tokens: int = 0
    prefill_pairs: float = 0.0
    copied_tokens: int = 0

    @classmethod
    def of(cls, plan: StepPlan) -> StepFeatures:
        tried = [work for work in plan.chunks if work.guesses]
        rows = [*plan.decodes, *tried]
        step = cls(
            rows=len(rows),
            kv_tokens=sum(work.start + 1 for work in rows),
            copied_tokens=plan.num_copied_tokens,
        )
        for work in plan.chunks:
            num_tokens = len(work.guesses) or work.num_tokens
            step = step.with_chunk(work.end - num_tokens, num_tokens)
        return step

    def with_chunk(self, start: int, num_tokens: int) -> StepFeatures:
        """This step and one more prefill chunk."""
        return self._replace(
            prefill_tokens=self.prefill_tokens + num_tokens,
            kv_tokens=self.kv_tokens + start + num_tokens,
            prefill_pairs=self.prefill_pairs + prefill_pairs(start, num_tokens),
        )


def prefill_pairs(start: int, num_tokens: int) -> float:
    """How many (query, key) pairs a chunk has that starts after `start` tokens."""
    return num_tokens * start + num_tokens * (num_tokens + 1) / 2


@dataclass(frozen=True, slots=True)
class StepCosts:
    """Seconds per step and per unit of each feature; measured at start-up, then learnt."""

    base_s: float = 0.005
    per_prefill_token_s: float = 0.0005
    per_row_s: float = 0.0005
    per_kv_token_s: float = 5e-7
    per_prefill_pair_s: float = 5e-7
    per_copied_token_s: float = 1e-6

    def as_list(self) -> list[float]:
        return [
            self.base_s,
            self.per_prefill_token_s,
            self.per_row_s,
            self.per_kv_token_s,
            self.per_prefill_pair_s,
            self.per_copied_token_s,
        ]


def _learning_units(costs: StepCosts) -> list[float]:
    """The initial costs, none of them zero: coefficients are learnt as multiples of these."""
    token_s = max(costs.per_prefill_token_s, 1e-7)
    row_s = max(costs.per_row_s, token_s / 10)
    floors = [token_s, token_s, row_s, row_s / 5000, token_s / 5000, token_s / 5000]
    return [max(cost, floor) for cost, floor in zip(costs.as_list(), floors, strict=True)]


class CostModel:
    """Forecasts step times and learns from measured ones. Owned by the scheduler."""

    def __init__(self, initial: StepCosts | None = None) -> None:
        initial = initial or StepCosts()
        self._units = _learning_units(initial)
        self._multiples = [
            cost / unit for cost, unit in zip(initial.as_list(), self._units, strict=True)
        ]
        self._costs = initial.as_list()
        size = len(self._units)
        self._information = [
            [PRIOR_WEIGHT if i == j else 0.0 for j in range(size)] for i in range(size)
        ]
        self._target = [PRIOR_WEIGHT * multiple for multiple in self._multiples]
        self._scale = INITIAL_SCALE

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
        surprise = math.log(step_s / self.forecast_s(features))
        believed, weight = self._believe(surprise)
        believed_s = step_s * math.exp(believed - surprise)
        shares = [
            unit * x / believed_s for unit, x in zip(self._units, (1.0, *features), strict=True)
        ]
        self._remember(shares, weight)
        self._solve()

    def max_chunk_tokens(self, slack_s: float, context: int) -> int:
        """The chunk after `context` tokens that adds `slack_s` seconds, to the nearest token: the
        root of per_pair / 2 · n² + (per_token + per_kv + per_pair · (context + 1/2)) · n
        = slack_s - per_kv · context."""
        _, per_token, _, per_kv_token, per_pair, _ = self._costs
        slack_s -= per_kv_token * context
        if slack_s <= 0:
            return 0
        linear = max(per_token + per_kv_token + per_pair * (context + 0.5), 1e-12)
        root = math.sqrt(linear * linear + 2 * per_pair * slack_s)
        return round(2 * slack_s / (linear + root))

    def max_copied_tokens(self, slack_s: float) -> int:
        """The tokens whose copies add `slack_s` seconds to a step."""
        return max(0, int(slack_s / max(self._costs[-1], MIN_COPIED_TOKEN_S)))

    def prefill_tokens_per_s(self, chunk_tokens: int) -> float:
        """Prompt throughput in chunks of this size, alone."""
        step = StepFeatures().with_chunk(0, chunk_tokens)
        return chunk_tokens / self.forecast_s(step)

    def decode_tokens_per_s(self, rows: int, kv_tokens: int) -> float:
        """Output throughput of so many rows, without prefill beside them."""
        return rows / self.forecast_s(StepFeatures(rows=rows, kv_tokens=kv_tokens))

    def _believe(self, surprise: float) -> tuple[float, float]:
        """How much of the surprise to take and with what weight; its scale follows."""
        bound = CLIP_AT_SCALES * self._scale
        is_outlier = abs(surprise) > self._scale
        scale = self._scale * (SCALE_GROWTH if is_outlier else SCALE_DECAY)
        self._scale = min(MAX_SCALE, max(MIN_SCALE, scale))
        if abs(surprise) <= bound:
            return surprise, 1.0
        return math.copysign(bound, surprise), bound / abs(surprise)

    def _remember(self, shares: list[float], weight: float) -> None:
        """Add an observation: the shares, each times its multiple, should sum up to 1."""
        forgetting = min(MAX_FORGETTING, FORGETTING_PER_SCALE * self._scale)
        keep, leak = 1 - forgetting, forgetting * PRIOR_WEIGHT
        for i, row in enumerate(self._information):
            weighted = weight * shares[i]
            for j, share in enumerate(shares):
                row[j] = keep * row[j] + weighted * share
            row[i] += leak
            self._target[i] = keep * self._target[i] + weighted + leak * self._multiples[i]

    def _solve(self) -> None:
        multiples = self._multiples
        for _ in range(DESCENT_SWEEPS):
            for i, row in enumerate(self._information):
                predicted = sum(a * m for a, m in zip(row, multiples, strict=True))
                step = (self._target[i] - predicted) / row[i]
                multiples[i] = max(0.0, multiples[i] + step)
        self._costs = [m * unit for m, unit in zip(multiples, self._units, strict=True)]
