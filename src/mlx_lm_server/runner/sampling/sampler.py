"""One vectorised sampler for all rows of a step.

The draw is a race (`race.py`, or what a back end has for it) with noise hashed from the row's seed,
the index of the token in its sequence and the token id. So a row's token depends on its own logits
and parameters only, never on what shares the batch.

Candidates are dropped in this order: penalties, logit bias, allowed tokens and bad words
(`bending.py`), temperature, min_p, top_k, typical_p, XTC, top_p.

Rows that ask for nothing cost nothing: greedy rows take part in one argmax only, and penalties and
bias touch only the rows that have them. Where there is a forced token, it comes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx

from mlx_lm_server.protocol import SamplingParams
from mlx_lm_server.runner.backend import Backend, RowDraw, Unary
from mlx_lm_server.runner.bounded_compile import BoundedCompile
from mlx_lm_server.runner.sampling.bending import Bending
from mlx_lm_server.runner.sampling.nucleus import Nucleus, nucleus_of
from mlx_lm_server.runner.sampling.race import Race
from mlx_lm_server.runner.sampling.row_sampling import RowSampling, splitmix
from mlx_lm_server.runner.sampling.truncation import exclude_top_choices, keep_typical
from mlx_lm_server.runner.sampling.vocabulary import Vocabulary, floors

XTC_SALT = 0x58544358544358


@dataclass(frozen=True, slots=True)
class _DrawParams:
    """Per-row parameters, as columns `[n, 1]` where they are arrays, kept while the same rows
    sample. `top_k` is 0 where it is off."""

    key: tuple[SamplingParams, ...]
    inverse_temperature: mx.array
    min_p: mx.array
    top_k: list[int]
    has_top_k: mx.array
    drops_unlikely: bool  # by min_p or top_k
    nucleus: Nucleus | None


@dataclass(frozen=True, slots=True)
class Draw:
    """The draw of one step on its way. `tokens` `[n]` int32 hold what was drawn after `finish`;
    what reads them must not be submitted before that, but for the arrays given to `submit`."""

    tokens: mx.array
    _native: RowDraw | None = None
    _logits: mx.array | None = None
    _params: Sequence[SamplingParams] = ()
    _keys: Sequence[int] = ()
    _forced: Mapping[int, int] = field(default_factory=dict)  # by place
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
        drawn = {**self._forced, **dict(zip(self._others, others, strict=True))}
        self._native.fill(self.tokens, self._logits, self._params, self._keys, drawn)


class Sampler:
    """Owned by the model runner, used on the engine's main thread only. Rows whose parameters the
    back end's own draw knows are drawn by it, where there is one, whatever the others ask for."""

    def __init__(self, vocab_size: int, backend: Backend) -> None:
        self.vocab_size = vocab_size
        self._native = backend.draw
        self._params: _DrawParams | None = None
        policy = backend.policy
        self._bending = Bending(vocab_size, is_in_host_memory=policy.is_in_host_memory)
        self._vocabulary = Vocabulary(vocab_size, policy.reduction_depth)
        self._race = Race(self._vocabulary, backend.log)
        weights = _Weights(backend.exp)
        self._weigh = BoundedCompile(weights.of_all)
        self._weigh_likely = BoundedCompile(weights.of_likely)

    @property
    def draws_in_host_memory(self) -> bool:
        """Returns whether tokens are there only once a draw has been finished."""
        return self._native is not None

    def start(self, logits: mx.array, rows: Sequence[RowSampling]) -> Draw:
        """Draw a token for each row of logits `[n, vocab]`. Advances the rows."""
        logits = self._bending.bend(logits, rows)
        forced = {i: token for i, row in enumerate(rows) if (token := row.forced_token) is not None}
        start = self._start_native if self._native else self._start_arrays
        draw = start(logits, rows, forced)
        for row in rows:
            row.next_index += 1
        self._bending.will_count(draw.tokens, rows)
        return draw

    def sample(self, logits: mx.array, rows: Sequence[RowSampling]) -> mx.array:
        """`start` and `finish`: logits `[n, vocab]` → ids `[n]` int32."""
        draw = self.start(logits, rows)
        draw.finish()
        return draw.tokens

    def let_go(self, row: RowSampling) -> None:
        """Lets a row go that has ended."""
        self._bending.let_go(row)

    @property
    def held_bytes(self) -> int:
        """Returns what is kept of rows between draws."""
        return self._bending.held_bytes

    def _start_native(
        self, logits: mx.array, rows: Sequence[RowSampling], forced: Mapping[int, int]
    ) -> Draw:
        others = tuple(i for i, row in enumerate(rows) if row.wants_arrays and i not in forced)
        other_tokens = None
        if others:
            other_rows = [rows[i] for i in others]
            other_tokens = self._draw(logits[mx.array(others, mx.int32)], other_rows)
        return Draw(
            tokens=mx.array([0] * len(rows), mx.int32),
            _native=self._native,
            _logits=mx.contiguous(logits.astype(mx.float32)),
            _params=[row.params for row in rows],
            _keys=[row.key for row in rows],
            _forced=forced,
            _others=others,
            _other_tokens=other_tokens,
        )

    def _start_arrays(
        self, logits: mx.array, rows: Sequence[RowSampling], forced: Mapping[int, int]
    ) -> Draw:
        drawing = [i for i, row in enumerate(rows) if not row.is_greedy and i not in forced]
        if len(drawing) == len(rows):
            return Draw(self._draw(logits, rows))
        tokens = mx.argmax(logits, axis=-1).view(mx.int32)
        if drawing:
            picked = mx.array(drawing, mx.int32)
            tokens[picked] = self._draw(logits[picked], [rows[i] for i in drawing])
        if forced:
            tokens[mx.array(list(forced), mx.int32)] = mx.array(list(forced.values()), mx.int32)
        return Draw(tokens)

    def _draw(self, logits: mx.array, rows: Sequence[RowSampling]) -> mx.array:
        params = self._columns(rows)
        top, scale = self._vocabulary.largest(logits), params.inverse_temperature
        if params.drops_unlikely:
            floor = floors(logits, params.top_k) if any(params.top_k) else top
            weights = self._weigh_likely(logits, top, scale, floor, params.has_top_k, params.min_p)
        else:
            weights = self._weigh(logits, top, scale)
        keys = [row.key for row in rows]
        weights = _truncate(weights, params.key, keys)
        return self._race.draw(weights, keys, params.nucleus)

    def _columns(self, rows: Sequence[RowSampling]) -> _DrawParams:
        key = tuple(row.params for row in rows)
        if self._params is None or self._params.key != key:
            self._params = _draw_params(key, self.vocab_size)
        return self._params


class _Weights:
    """In proportion to probabilities, the likeliest token's being 1: of logits `[n, vocab]`, with
    columns `[n, 1]`."""

    def __init__(self, exp: Unary) -> None:
        self._exp = exp

    def of_all(self, logits: mx.array, top: mx.array, scale: mx.array) -> mx.array:
        return self._exp((logits.astype(mx.float32) - top.astype(mx.float32)) * scale)

    def of_likely(
        self,
        logits: mx.array,
        top: mx.array,
        scale: mx.array,
        floor: mx.array,
        has_floor: mx.array,
        min_p: mx.array,
    ) -> mx.array:
        """0 where a weight is below `min_p` or, where there is a floor, below that logit's."""
        weights = self.of_all(logits, top, scale)
        least = mx.maximum(min_p, has_floor * self.of_all(floor, top, scale))
        return mx.where(weights >= least, weights, 0.0)


def _draw_params(key: tuple[SamplingParams, ...], vocab_size: int) -> _DrawParams:
    top_k = [p.top_k if 0 < p.top_k < vocab_size else 0 for p in key]
    return _DrawParams(
        key=key,
        inverse_temperature=mx.array([[1.0 / p.temperature] for p in key]),
        min_p=mx.array([[p.min_p] for p in key]),
        top_k=top_k,
        has_top_k=mx.array([[float(k > 0)] for k in top_k]),
        drops_unlikely=any(top_k) or any(p.min_p > 0 for p in key),
        nucleus=nucleus_of([p.top_p for p in key], vocab_size),
    )


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


def _chance(key: int) -> float:
    return splitmix(key) / 2.0**64
