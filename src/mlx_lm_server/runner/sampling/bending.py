"""Logits as a row's own request bends them, before the draw: for all rows of a step at once.

In this order: penalties and allowed tokens, from lines of one table (`tallies.py`); logit bias and
single bad words, added in one scatter; the ends of longer bad words, and stop tokens before the
least number of tokens, held down in another. Rows that ask for nothing are not touched.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import mlx.core as mx

from mlx_lm_server.protocol import SamplingParams
from mlx_lm_server.runner.bounded_compile import BoundedCompile
from mlx_lm_server.runner.sampling.row_sampling import FORBIDDEN, RowSampling
from mlx_lm_server.runner.sampling.tallies import Tally, TallyTable


class _Asked(NamedTuple):
    """What any of some rows asks for."""

    repetition: bool
    frequency: bool
    presence: bool
    allowed: bool


@dataclass(frozen=True, slots=True)
class _Penalties:
    """Columns `[n, 1]`, kept while the same rows sample."""

    key: tuple[SamplingParams, ...]
    asked: _Asked
    columns: tuple[mx.array, mx.array, mx.array]


class _Numbers(NamedTuple):
    """Numbers for some places of `[n, vocab]`."""

    rows: mx.array
    tokens: mx.array
    values: mx.array


# Numbers by token, for rows by their place.
ByToken = Sequence[tuple[int, Mapping[int, float]]]


class Bending:
    """Owned by the sampler."""

    def __init__(self, vocab_size: int, *, is_in_host_memory: bool) -> None:
        self._tallies = TallyTable(vocab_size)
        self._put = _put_by_copies if is_in_host_memory else _put_at_once
        self._punish: dict[_Asked, Callable[..., mx.array]] = {}
        self._penalties: _Penalties | None = None
        self._biases: tuple[ByToken, _Numbers] | None = None

    @property
    def held_bytes(self) -> int:
        return self._tallies.nbytes

    def bend(self, logits: mx.array, rows: Sequence[RowSampling]) -> mx.array:
        """Logits `[n, vocab]` → the same, or others in float32 where anything bends them."""
        bent = [i for i, row in enumerate(rows) if row.is_bent]
        if not bent:
            return logits
        tallies = {i: tally for i in bent if (tally := rows[i].tally) is not None}
        if tallies:
            logits = self._by_tallies(logits, rows, tallies)
        biases = [(i, rows[i].biases) for i in bent if rows[i].biases]
        if biases:
            if self._biases is None or self._biases[0] != biases:
                self._biases = biases, _numbers(biases)
            added = self._biases[1]
            logits = logits.astype(mx.float32).at[added.rows, added.tokens].add(added.values)
        bounds = [(i, bound) for i in bent if (bound := _bounds(rows[i]))]
        if bounds:
            most = _numbers(bounds)
            logits = logits.astype(mx.float32).at[most.rows, most.tokens].minimum(most.values)
        return logits

    def will_count(self, tokens: mx.array, rows: Sequence[RowSampling]) -> None:
        """Takes what was drawn of the rows, to be counted before they draw again."""
        self._tallies.will_count(tokens, [row.counted_in for row in rows])

    def let_go(self, row: RowSampling) -> None:
        """Lets a row go that has ended."""
        if row.tally is not None:
            self._tallies.let_go(row.tally)

    def _by_tallies(
        self, logits: mx.array, rows: Sequence[RowSampling], tallies: Mapping[int, Tally]
    ) -> mx.array:
        picked = [rows[i] for i in tallies]
        lines = self._tallies.of(list(tallies.values()), [row.tried or () for row in picked])
        penalties = self._penalties_of(picked)
        punish = self._punished_as(penalties.asked)
        if len(picked) == len(rows):
            return punish(logits, lines, *penalties.columns)
        places = mx.array(list(tallies), mx.int32)
        own = punish(logits[places], lines, *penalties.columns)
        return self._put(logits.astype(mx.float32), list(tallies), own)

    def _penalties_of(self, rows: Sequence[RowSampling]) -> _Penalties:
        key = tuple(row.params for row in rows)
        if self._penalties is None or self._penalties.key != key:
            self._penalties = _penalties(key)
        return self._penalties

    def _punished_as(self, asked: _Asked) -> Callable[..., mx.array]:
        if asked not in self._punish:
            self._punish[asked] = BoundedCompile(partial(_punished, asked))
        return self._punish[asked]


def _penalties(key: tuple[SamplingParams, ...]) -> _Penalties:
    return _Penalties(
        key=key,
        asked=_Asked(
            repetition=any(p.repetition_penalty != 1.0 for p in key),
            frequency=any(p.frequency_penalty for p in key),
            presence=any(p.presence_penalty for p in key),
            allowed=any(p.allowed_token_ids for p in key),
        ),
        columns=(
            mx.array([[p.repetition_penalty] for p in key]),
            mx.array([[p.frequency_penalty] for p in key]),
            mx.array([[p.presence_penalty] for p in key]),
        ),
    )


def _punished(
    asked: _Asked,
    logits: mx.array,
    lines: mx.array,
    repetition: mx.array,
    frequency: mx.array,
    presence: mx.array,
) -> mx.array:
    """Repetition as in CTRL (Keskar et al. 2019), frequency and presence as OpenAI defines them."""
    bent = logits.astype(mx.float32)
    if asked.repetition:
        punished = mx.where(bent > 0, bent / repetition, bent * repetition)
        bent = mx.where(lines > 0, punished, bent)
    if asked.frequency:
        bent = bent - frequency * mx.floor(lines)
    if asked.presence:
        bent = bent - presence * (lines >= 1.0)
    return mx.where(lines < 0, -mx.inf, bent) if asked.allowed else bent


def _put_at_once(logits: mx.array, places: list[int], own: mx.array) -> mx.array:
    logits[mx.array(places, mx.int32)] = own
    return logits


def _put_by_copies(logits: mx.array, places: list[int], own: mx.array) -> mx.array:
    """A scatter on a CPU takes 10 ns an element, a copy a tenth."""
    for number, place in enumerate(places):
        logits[place] = own[number]
    return logits


def _bounds(row: RowSampling) -> dict[int, float]:
    """Returns what logits of some tokens are at most."""
    bounds = dict.fromkeys(row.forbidden_tokens, FORBIDDEN)
    if row.may_not_end:
        bounds |= dict.fromkeys(row.params.stop_token_ids, float("-inf"))
    return bounds


def _numbers(by_token: ByToken) -> _Numbers:
    rows = [place for place, numbers in by_token for _ in numbers]
    tokens = [token for _, numbers in by_token for token in numbers]
    values = [value for _, numbers in by_token for value in numbers.values()]
    return _Numbers(mx.array(rows, mx.int32), mx.array(tokens, mx.int32), mx.array(values))
