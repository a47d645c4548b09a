"""One vectorised sampler for all rows of a step.

The draw is Gumbel-max (Gumbel 1954; as exponential races: the token with the largest p / E wins,
E ~ Exp(1)) with E hashed from the row's seed, the index of the token in its sequence and the token
id. So a row's token depends on its own logits and parameters only, never on what shares the batch.

Candidates are dropped in this order: logit bias and penalties, temperature, min_p, top_k,
typical_p, XTC, top_p.
Top-p needs no sort: the winner of the race over *all* candidates is right if it lies in the
nucleus, which one sum decides; else nothing less likely than it lies there either, so the race is
run again among what is more likely. After `_race_rounds` rounds the most likely token is taken,
which happens with a probability below 1e-6.

Rows that ask for nothing cost nothing: greedy rows take part in one argmax only, and penalties and
bias touch only the rows that have them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import mlx.core as mx

from mlx_lm_server.core.thinking import ThinkingClock
from mlx_lm_server.protocol import SamplingParams
from mlx_lm_server.runner import fast_math
from mlx_lm_server.runner.logprobs import PromptScores
from mlx_lm_server.runner.truncation import exclude_top_choices, keep_typical

MASK_64 = (1 << 64) - 1
RACE_MISS_PROBABILITY = 1e-6
XTC_SALT = 0x58544358544358


@dataclass(slots=True)
class RowSampling:
    """What the sampler keeps of one row. `next_index` is the index in the sequence of the token
    drawn next; `output_counts` and `seen` are `[vocab]` float32, only for rows with penalties."""

    params: SamplingParams
    next_index: int
    output_counts: mx.array | None = None
    seen: mx.array | None = None
    bias: mx.array | None = None
    stop_ids: mx.array | None = None  # not to be drawn before index `ends_from`
    ends_from: int = 0
    prompt_scores: PromptScores | None = None
    thinking: ThinkingClock | None = None

    @property
    def may_not_end(self) -> bool:
        return self.stop_ids is not None and self.next_index < self.ends_from

    @property
    def has_penalties(self) -> bool:
        return self.output_counts is not None

    @property
    def forced_token(self) -> int | None:
        return None if self.thinking is None else self.thinking.forced

    @property
    def changes_logits(self) -> bool:
        is_bent = self.has_penalties or self.bias is not None
        return is_bent or self.may_not_end or self.forced_token is not None

    @property
    def is_greedy(self) -> bool:
        return self.params.temperature == 0.0


def start_row(
    params: SamplingParams, prompt_ids: Sequence[int], output_ids: Sequence[int], vocab_size: int
) -> RowSampling:
    """The state of a row that joins with these tokens known."""
    row = RowSampling(params, len(prompt_ids) + len(output_ids))
    has_repetition = params.repetition_penalty != 1.0
    if params.presence_penalty or params.frequency_penalty or has_repetition:
        row.output_counts = _counts(output_ids, vocab_size)
        row.seen = mx.minimum(_counts((*prompt_ids, *output_ids), vocab_size), 1.0)
    if params.logit_bias:
        ids = mx.array(list(params.logit_bias), mx.int32)
        row.bias = mx.zeros(vocab_size).at[ids].add(mx.array(list(params.logit_bias.values())))
    if params.min_tokens and params.stop_token_ids:
        row.stop_ids = mx.array(list(params.stop_token_ids), mx.int32)
        row.ends_from = len(prompt_ids) + params.min_tokens
    if params.thinking is not None:
        row.thinking = ThinkingClock(params.thinking, output_ids)
    if params.prompt_logprobs is not None and not output_ids:
        row.prompt_scores = PromptScores(prompt_ids, params.prompt_logprobs)
    return row


def _counts(ids: Sequence[int], vocab_size: int) -> mx.array:
    zeros = mx.zeros(vocab_size)
    return zeros.at[mx.array(list(ids), mx.int32)].add(1.0) if ids else zeros


@dataclass(frozen=True, slots=True)
class _DrawParams:
    """Per-row parameters as columns `[n, 1]`, kept while the same rows sample."""

    key: tuple[SamplingParams, ...]
    inverse_temperature: mx.array
    min_p: mx.array
    top_p: mx.array
    top_k: list[int]
    race_rounds: list[int]
    uses_min_p: bool


@dataclass(slots=True)
class Sampler:
    """Owned by the model runner, used on the engine's main thread only."""

    vocab_size: int
    _params: _DrawParams | None = None
    _race: fast_math.BoundedCompile = field(init=False)
    _exp: fast_math.BoundedCompile = field(init=False)
    _ids: mx.array = field(init=False)

    def __post_init__(self) -> None:
        arithmetic = fast_math.is_slow_cpu()
        exp, log = fast_math.exp_of(arithmetic), fast_math.log_of(arithmetic)
        self._exp = fast_math.BoundedCompile(lambda x, top, scale: exp((x - top) * scale))
        self._race = fast_math.BoundedCompile(
            lambda weights, keys_a, keys_b, ids: weights / _exponential(keys_a, keys_b, ids, log)
        )
        self._ids = mx.arange(self.vocab_size, dtype=mx.uint32)[None]

    def sample(self, logits: mx.array, rows: Sequence[RowSampling]) -> mx.array:
        """Draw a token for each row: logits `[n, vocab]` → ids `[n]` int32. Advances the rows."""
        logits = logits.astype(mx.float32)
        logits = _adjust(logits, rows)
        tokens = mx.argmax(logits, axis=-1).astype(mx.int32)
        drawing = [i for i, row in enumerate(rows) if not row.is_greedy]
        if len(drawing) == len(rows):
            tokens = self._draw(logits, rows)
        elif drawing:
            picked = mx.array(drawing, mx.int32)
            tokens[picked] = self._draw(logits[picked], [rows[i] for i in drawing])
        for i, row in enumerate(rows):
            row.next_index += 1
            if row.has_penalties:
                _count(row, tokens[i : i + 1])
        return tokens

    def _draw(self, logits: mx.array, rows: Sequence[RowSampling]) -> mx.array:
        params = self._columns(rows)
        top = logits.max(axis=-1, keepdims=True)
        weights = self._exp(logits, top, params.inverse_temperature)
        if params.uses_min_p:
            weights = mx.where(weights >= params.min_p, weights, 0.0)
        if any(params.top_k):
            weights = _keep_top_k(weights, params.top_k)
        keys = [_row_key(row.params.seed, row.next_index) for row in rows]
        weights = _truncate(weights, params.key, keys)
        race = self._race(
            weights,
            mx.array([[k >> 32] for k in keys], mx.uint32),
            mx.array([[k & 0xFFFFFFFF] for k in keys], mx.uint32),
            self._ids,
        )
        winner = mx.argmax(race, axis=-1, keepdims=True)
        if any(params.race_rounds):
            winner = _race_into_nucleus(race, winner, weights, params)
        return winner[:, 0].astype(mx.int32)

    def _columns(self, rows: Sequence[RowSampling]) -> _DrawParams:
        key = tuple(row.params for row in rows)
        if self._params is None or self._params.key != key:
            self._params = _draw_params(key)
        return self._params


def _draw_params(key: tuple[SamplingParams, ...]) -> _DrawParams:
    return _DrawParams(
        key=key,
        inverse_temperature=mx.array([[1.0 / p.temperature] for p in key]),
        min_p=mx.array([[p.min_p] for p in key]),
        top_p=mx.array([[p.top_p] for p in key]),
        top_k=[p.top_k for p in key],
        race_rounds=[_race_rounds(p.top_p) for p in key],
        uses_min_p=any(p.min_p > 0 for p in key),
    )


def _race_rounds(top_p: float) -> int:
    """Rounds after which the race has missed the nucleus with a probability below 1e-6.

    A round misses with probability 1 - top_p at first; each miss removes, in the mean, half of
    what lies outside.
    """
    if top_p >= 1.0:
        return 0
    outside, missed, rounds = 1.0 - top_p, 1.0, 0
    while missed > RACE_MISS_PROBABILITY and rounds < 40:
        missed *= outside / (outside + max(top_p, 1e-6))
        outside /= 2
        rounds += 1
    return rounds


def _race_into_nucleus(
    race: mx.array, winner: mx.array, weights: mx.array, params: _DrawParams
) -> mx.array:
    """Rerun the race among more likely tokens for as long as the winner is outside the nucleus:
    a token is inside if the mass of all more likely ones is below top_p."""
    limit = params.top_p * weights.sum(axis=-1, keepdims=True)
    likeliest = mx.argmax(weights, axis=-1, keepdims=True)
    rounds = mx.array([[r] for r in params.race_rounds])
    is_done = rounds == 0
    for i in range(max(params.race_rounds)):
        bar = mx.take_along_axis(weights, winner, axis=-1)
        mass_above = _keep_above(weights, weights, bar).sum(axis=-1, keepdims=True)
        is_done = is_done | (mass_above < limit)
        race = _keep_above(race, weights, bar)
        again = mx.where(rounds == i + 1, likeliest, mx.argmax(race, axis=-1, keepdims=True))
        winner = mx.where(is_done, winner, again)
        is_done = is_done | (rounds == i + 1)
    return winner


def _above(values: mx.array, weights: mx.array, bar: mx.array) -> mx.array:
    return values * (weights > bar)


_keep_above = fast_math.BoundedCompile(_above)


def _keep_top_k(weights: mx.array, top_k: Sequence[int]) -> mx.array:
    """Zero all weights below each row's k-th largest (k = 0: keep all; ties stay)."""
    vocab_size = weights.shape[-1]
    ks = [k if 0 < k < vocab_size else vocab_size for k in top_k]
    deepest = max((k for k in ks if k < vocab_size), default=0)
    if deepest == 0:
        return weights
    leaders = mx.sort(mx.topk(weights, deepest, axis=-1), axis=-1)  # ascending
    column = mx.array([[deepest - k if k <= deepest else 0] for k in ks])
    floor = mx.take_along_axis(leaders, column, axis=-1)
    is_off = mx.array([[k == vocab_size] for k in ks])
    return mx.where(is_off | (weights >= floor), weights, 0.0)


def _truncate(weights: mx.array, params: Sequence[SamplingParams], keys: Sequence[int]) -> mx.array:
    """typical_p and XTC, for the rows that ask. Whether XTC applies to a token is hashed from the
    row's key."""
    typical = [i for i, p in enumerate(params) if p.typical_p < 1.0]
    if typical:
        limits = mx.array([[params[i].typical_p] for i in typical])
        rows = mx.array(typical, mx.int32)
        weights[rows] = keep_typical(weights[rows], limits)
    xtc = [
        i
        for i, p in enumerate(params)
        if p.xtc_probability and _chance(keys[i] ^ XTC_SALT) < p.xtc_probability
    ]
    if xtc:
        limits = mx.array([[params[i].xtc_threshold] for i in xtc])
        rows = mx.array(xtc, mx.int32)
        weights[rows] = exclude_top_choices(weights[rows], limits)
    return weights


def _adjust(logits: mx.array, rows: Sequence[RowSampling]) -> mx.array:
    """Penalties and bias, for the rows that have them."""
    for i, row in enumerate(rows):
        if row.changes_logits:
            logits[i] = _adjust_row(logits[i], row)
    return logits


def _adjust_row(logits: mx.array, row: RowSampling) -> mx.array:
    """Repetition as in CTRL (Keskar et al. 2019), frequency and presence as OpenAI defines them. A
    forced token is the only candidate."""
    params = row.params
    if (forced := row.forced_token) is not None:
        only = mx.full(logits.shape, -mx.inf)
        only[forced] = 0.0
        return only
    if row.output_counts is not None and row.seen is not None:
        if params.repetition_penalty != 1.0:
            penalty = params.repetition_penalty
            punished = mx.where(logits > 0, logits / penalty, logits * penalty)
            logits = mx.where(row.seen > 0, punished, logits)
        logits = logits - params.frequency_penalty * row.output_counts
        logits = logits - params.presence_penalty * mx.minimum(row.output_counts, 1.0)
    if row.bias is not None:
        logits = logits + row.bias
    if row.may_not_end:
        logits[row.stop_ids] = -mx.inf
    return logits


def _count(row: RowSampling, token: mx.array) -> None:
    if row.output_counts is not None and row.seen is not None:
        row.output_counts = row.output_counts.at[token].add(1.0)
        row.seen = row.seen.at[token].maximum(1.0)


def _row_key(seed: int, index: int) -> int:
    """64 bits from seed and token index (SplitMix64, Steele et al. 2014)."""
    return _splitmix(_splitmix(seed & MASK_64) ^ (index * 0x9E3779B97F4A7C15 & MASK_64))


def _chance(key: int) -> float:
    return _splitmix(key) / 2.0**64


def _splitmix(x: int) -> int:
    x = (x + 0x9E3779B97F4A7C15) & MASK_64
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK_64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK_64
    return x ^ (x >> 31)


def _exponential(
    keys_a: mx.array, keys_b: mx.array, ids: mx.array, log: fast_math.Unary
) -> mx.array:
    """Exp(1) noise hashed from a row's two key words and the token id (MurmurHash3's finaliser,
    Appleby 2011): keys `[n, 1]`, ids `[1, vocab]` → `[n, vocab]`."""
    h = ids * mx.array(0x9E3779B1, mx.uint32) + keys_a
    h = (h ^ (h >> 16)) * mx.array(0x85EBCA6B, mx.uint32) + keys_b
    h = (h ^ (h >> 13)) * mx.array(0xC2B2AE35, mx.uint32)
    h = h ^ (h >> 16)
    uniform = ((h >> 8).astype(mx.float32) + 0.5) * 2.0**-24
    return -log(uniform)
