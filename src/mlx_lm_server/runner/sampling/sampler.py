"""One vectorised sampler for all rows of a step.

The draw is a race (`race.py`, or what a back end has for it) with noise hashed from the row's seed,
the index of the token in its sequence and the token id. So a row's token depends on its own logits
and parameters only, never on what shares the batch.

Candidates are dropped in this order: penalties, logit bias, allowed tokens and bad words,
temperature, min_p, top_k, typical_p, XTC, top_p.

Rows that ask for nothing cost nothing: greedy rows take part in one argmax only, and penalties and
bias touch only the rows that have them.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx

from mlx_lm_server.core.bad_words import BadWords
from mlx_lm_server.core.thinking import ThinkingClock
from mlx_lm_server.protocol import SamplingParams
from mlx_lm_server.runner.backend import Backend, RowDraw
from mlx_lm_server.runner.bounded_compile import BoundedCompile
from mlx_lm_server.runner.sampling.logprobs import PromptScores
from mlx_lm_server.runner.sampling.race import Race, Vocabulary, race_rounds
from mlx_lm_server.runner.sampling.truncation import exclude_top_choices, keep_typical

MASK_64 = (1 << 64) - 1
XTC_SALT = 0x58544358544358
# Logit of a bad word's last token: no chance beside any other, but one where nothing else is left.
FORBIDDEN = -1e30


@dataclass(slots=True)
class RowSampling:
    """What the sampler keeps of one row. `next_index` is the index in the sequence of the token
    drawn next; `output_counts` and `seen` are `[vocab]` float32, only for rows with penalties;
    `bias` `[vocab]` says which tokens are never drawn, too."""

    params: SamplingParams
    next_index: int
    output_counts: mx.array | None = None
    seen: mx.array | None = None
    bias: mx.array | None = None
    stop_ids: mx.array | None = None  # not to be drawn before index `ends_from`
    ends_from: int = 0
    prompt_scores: PromptScores | None = None
    thinking: ThinkingClock | None = None
    bad_words: BadWords | None = None

    @property
    def follows_tokens(self) -> bool:
        """Whether what it may draw depends on what was read of it last."""
        return self.thinking is not None or self.bad_words is not None

    def follow(self, token: int) -> None:
        """The token that was drawn last, as it was read."""
        if self.thinking is not None:
            self.thinking.push(token)
        if self.bad_words is not None:
            self.bad_words.push(token)

    def take(self, tokens: Sequence[int]) -> None:
        """Goes on behind tokens that the host knows, as if each had been drawn."""
        self.next_index += len(tokens)
        if self.output_counts is not None and tokens:
            _count(self, mx.array(list(tokens), mx.int32))
        for token in tokens:
            self.follow(token)

    def ahead(self, guesses: Sequence[int]) -> list[RowSampling]:
        """Returns the states in which the row draws after none of the guesses, after one, … after
        all of them."""
        states = [self._copy()]
        for token in guesses:
            states.append(states[-1]._copy())
            states[-1].take([token])
        return states

    def _copy(self) -> RowSampling:
        return replace(self, thinking=copy(self.thinking), bad_words=copy(self.bad_words))

    @property
    def forbidden_tokens(self) -> Sequence[int]:
        return () if self.bad_words is None else self.bad_words.forbidden

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
        is_bound = self.may_not_end or self.forced_token is not None
        return is_bent or is_bound or bool(self.forbidden_tokens)

    @property
    def is_greedy(self) -> bool:
        return self.params.temperature == 0.0

    @property
    def wants_arrays(self) -> bool:
        """Whether it draws in a way that only the arrays know."""
        params = self.params
        return not self.is_greedy and (params.typical_p < 1.0 or params.xtc_probability > 0.0)

    @property
    def key(self) -> int:
        """64 bits for the noise of the next token."""
        return _row_key(self.params.seed, self.next_index)


def start_row(
    params: SamplingParams, prompt_ids: Sequence[int], output_ids: Sequence[int], vocab_size: int
) -> RowSampling:
    """The state of a row that joins with these tokens known."""
    row = RowSampling(params, len(prompt_ids) + len(output_ids))
    has_repetition = params.repetition_penalty != 1.0
    if params.presence_penalty or params.frequency_penalty or has_repetition:
        row.output_counts = _counts(output_ids, vocab_size)
        row.seen = mx.minimum(_counts((*prompt_ids, *output_ids), vocab_size), 1.0)
    row.bias = _bias(params, vocab_size)
    if several := [word for word in params.bad_words if len(word) > 1]:
        row.bad_words = BadWords(several, output_ids)
    if params.min_tokens and params.stop_token_ids:
        row.stop_ids = mx.array(list(params.stop_token_ids), mx.int32)
        row.ends_from = len(prompt_ids) + params.min_tokens
    if params.thinking is not None:
        row.thinking = ThinkingClock(params.thinking, output_ids)
    if params.prompt_logprobs is not None and not output_ids:
        row.prompt_scores = PromptScores(prompt_ids, params.prompt_logprobs)
    return row


def _bias(params: SamplingParams, vocab_size: int) -> mx.array | None:
    """`[vocab]`: all that is added to the logits at every step; None where that is nothing."""
    biases = {word[0]: FORBIDDEN for word in params.bad_words if len(word) == 1}
    biases = {**params.logit_bias, **biases}
    if not biases and not params.allowed_token_ids:
        return None
    found = mx.zeros(vocab_size)
    if biases:
        found[mx.array(list(biases), mx.int32)] = mx.array(list(biases.values()))
    if params.allowed_token_ids:
        only = mx.full((vocab_size,), -mx.inf)
        only[mx.array(params.allowed_token_ids, mx.int32)] = 0.0
        found = found + only
    return found


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


@dataclass(frozen=True, slots=True)
class Draw:
    """The draw of one step on its way. `tokens` `[n]` int32 hold what was drawn after `finish`;
    what reads them must not be submitted before that, but for the arrays given to `submit`."""

    tokens: mx.array
    _native: RowDraw | None = None
    _logits: mx.array | None = None
    _params: Sequence[SamplingParams] = ()
    _keys: Sequence[int] = ()
    _others: tuple[int, ...] = ()  # places of rows that are drawn with arrays
    _other_tokens: mx.array | None = None

    def submit(self, *readers: mx.array) -> None:
        """Start what can be started now; `readers` of the tokens too, if possible."""
        if self._native is None:
            mx.async_eval(self.tokens, *readers)
        else:
            mx.async_eval(self._logits, self._other_tokens)

    def finish(self) -> None:
        """Wait for the tokens."""
        if self._native is None or self._logits is None:
            mx.eval(self.tokens)
            return
        mx.eval(self._logits, self._other_tokens)
        others: Any = [] if self._other_tokens is None else self._other_tokens.tolist()
        drawn = dict(zip(self._others, others, strict=True))
        self._native.fill(self.tokens, self._logits, self._params, self._keys, drawn)


class Sampler:
    """Owned by the model runner, used on the engine's main thread only. Rows whose parameters the
    back end's own draw knows are drawn by it, where there is one, whatever the others ask for."""

    def __init__(self, vocab_size: int, backend: Backend) -> None:
        self.vocab_size = vocab_size
        self._native = backend.draw
        self._params: _DrawParams | None = None
        self._vocabulary = Vocabulary(vocab_size, backend.policy.reduction_depth)
        self._race = Race(self._vocabulary, backend.log)
        self._exp = BoundedCompile(backend.exp)

    @property
    def draws_in_host_memory(self) -> bool:
        """Whether tokens are there only once a draw has been finished."""
        return self._native is not None

    def start(self, logits: mx.array, rows: Sequence[RowSampling]) -> Draw:
        """Draw a token for each row of logits `[n, vocab]`. Advances the rows."""
        logits = _adjust(logits.astype(mx.float32), rows)
        draw = self._start_native(logits, rows) if self._native else Draw(self._all(logits, rows))
        for i, row in enumerate(rows):
            row.next_index += 1
            if row.has_penalties:
                _count(row, draw.tokens[i : i + 1])
        return draw

    def sample(self, logits: mx.array, rows: Sequence[RowSampling]) -> mx.array:
        """`start` and `finish`: logits `[n, vocab]` → ids `[n]` int32."""
        draw = self.start(logits, rows)
        draw.finish()
        return draw.tokens

    def _start_native(self, logits: mx.array, rows: Sequence[RowSampling]) -> Draw:
        others = tuple(i for i, row in enumerate(rows) if row.wants_arrays)
        other_tokens = None
        if others:
            other_rows = [rows[i] for i in others]
            other_tokens = self._draw(logits[mx.array(others, mx.int32)], other_rows)
        return Draw(
            tokens=mx.array([0] * len(rows), mx.int32),
            _native=self._native,
            _logits=mx.contiguous(logits),
            _params=[row.params for row in rows],
            _keys=[row.key for row in rows],
            _others=others,
            _other_tokens=other_tokens,
        )

    def _all(self, logits: mx.array, rows: Sequence[RowSampling]) -> mx.array:
        drawing = [i for i, row in enumerate(rows) if not row.is_greedy]
        if len(drawing) == len(rows):
            return self._draw(logits, rows)
        tokens = mx.argmax(logits, axis=-1).astype(mx.int32)
        if drawing:
            picked = mx.array(drawing, mx.int32)
            tokens[picked] = self._draw(logits[picked], [rows[i] for i in drawing])
        return tokens

    def _draw(self, logits: mx.array, rows: Sequence[RowSampling]) -> mx.array:
        params = self._columns(rows)
        top = self._vocabulary.largest(logits)
        weights = self._exp((logits - top) * params.inverse_temperature)
        if params.uses_min_p:
            weights = mx.where(weights >= params.min_p, weights, 0.0)
        if any(params.top_k):
            weights = _keep_top_k(weights, params.top_k)
        keys = [row.key for row in rows]
        weights = _truncate(weights, params.key, keys)
        return self._race.draw(weights, keys, params.top_p, params.race_rounds)

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
        race_rounds=[race_rounds(p.top_p) for p in key],
        uses_min_p=any(p.min_p > 0 for p in key),
    )


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
    """Penalties, bias and what is forbidden, for the rows that have them."""
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
        if params.frequency_penalty:
            logits = logits - params.frequency_penalty * row.output_counts
        if params.presence_penalty:
            logits = logits - params.presence_penalty * mx.minimum(row.output_counts, 1.0)
    if row.bias is not None:
        logits = logits + row.bias
    if forbidden := row.forbidden_tokens:
        ids = mx.array(list(forbidden), mx.int32)
        logits[ids] = mx.minimum(logits[ids], FORBIDDEN)
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
