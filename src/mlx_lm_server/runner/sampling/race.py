"""The draw itself, for all rows at once: a race that each row runs with noise of its own.

Gumbel-max (Gumbel 1954) as exponential races: the token with the largest p / E wins, E ~ Exp(1)
hashed from the row's key and the token id.

Top-p needs no sort: the winner of the race over *all* candidates is right if it lies in the
nucleus, which one sum decides; else nothing less likely than it lies there either, so the race is
run again among what is more likely. After `race_rounds` rounds the most likely token is taken,
which happens with a probability below 1e-6.

What it costs is passes over `[rows, vocab]`. MLX's CPU back end reduces the last axis element by
element (1.2 ns each) and an axis before it by vectors (0.2), so the vocabulary is looked at as
`[depth, width]` and reduced over its depth first. An operation between a matrix and a column is
fast by itself (0.2 ns) and slow inside `mx.compile` (0.8), which then cannot assume contiguous
inputs: only what has one shape is compiled.
"""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx

from mlx_lm_server.runner.backend import Unary
from mlx_lm_server.runner.bounded_compile import BoundedCompile

RACE_MISS_PROBABILITY = 1e-6


def race_rounds(top_p: float) -> int:
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


class Vocabulary:
    """Reductions over `[n, vocab]`, each to `[n, 1]`, in up to `max_depth` parts."""

    def __init__(self, size: int, max_depth: int) -> None:
        self.size = size
        depths = range(max_depth, 0, -1)
        self._depth = next(depth for depth in depths if size % depth == 0)
        self._width = size // self._depth

    def largest(self, values: mx.array) -> mx.array:
        return self._stacked(values).max(axis=1).max(axis=-1, keepdims=True)

    def total(self, values: mx.array) -> mx.array:
        return self._stacked(values).sum(axis=1).sum(axis=-1, keepdims=True)

    def place_of_largest(self, values: mx.array) -> mx.array:
        """Returns one of the places, where several hold the largest value."""
        if self._depth == 1:
            return mx.argmax(values, axis=-1, keepdims=True)
        stacked = self._stacked(values)
        column = mx.argmax(stacked.max(axis=1), axis=-1, keepdims=True)
        inside = mx.take_along_axis(stacked, column[:, None], axis=2)  # [n, depth, 1]
        return mx.argmax(inside, axis=1) * self._width + column

    def _stacked(self, values: mx.array) -> mx.array:
        return values.reshape(-1, self._depth, self._width)


class Race:
    """Draws one token for each row from its weights. Owned by the sampler."""

    def __init__(self, vocabulary: Vocabulary, log: Unary) -> None:
        self._vocabulary = vocabulary
        self._spread_ids = mx.arange(vocabulary.size, dtype=mx.uint32)[None] * 0x9E3779B1
        self._mix = BoundedCompile(_mix)
        self._run = BoundedCompile(lambda weights, h: weights / -log(_uniform(h)))

    def draw(
        self, weights: mx.array, keys: Sequence[int], top_p: mx.array, rounds: Sequence[int]
    ) -> mx.array:
        """Weights `[n, vocab]` in proportion to probabilities, 64-bit keys, top_p `[n, 1]` and
        `race_rounds` of it → token ids `[n]` int32."""
        race = self._run(weights, self._hash(keys))
        winner = self._vocabulary.place_of_largest(race)
        if any(rounds):
            winner = self._into_nucleus(race, winner, weights, top_p, rounds)
        return winner[:, 0].astype(mx.int32)

    def _hash(self, keys: Sequence[int]) -> mx.array:
        """32 bits for each row and token, `[n, vocab]`, but for the last mixing in `_uniform`
        (MurmurHash3's finaliser, Appleby 2011, with the key's two words added)."""
        first = mx.array([[key >> 32] for key in keys], mx.uint32)
        second = mx.array([[key & 0xFFFFFFFF] for key in keys], mx.uint32)
        return self._mix(self._spread_ids + first) + second

    def _into_nucleus(
        self,
        race: mx.array,
        winner: mx.array,
        weights: mx.array,
        top_p: mx.array,
        rounds: Sequence[int],
    ) -> mx.array:
        """Rerun the race among more likely tokens for as long as the winner is outside the
        nucleus: a token is inside if the mass of all more likely ones is below top_p."""
        vocabulary = self._vocabulary
        limit = top_p * vocabulary.total(weights)
        likeliest = vocabulary.place_of_largest(weights)
        last = mx.array([[num] for num in rounds])
        is_done = last == 0
        for i in range(1, max(rounds) + 1):
            is_above = weights > mx.take_along_axis(weights, winner, axis=-1)
            is_done = is_done | (vocabulary.total(weights * is_above) < limit)
            again = likeliest
            if i < max(rounds):
                again = vocabulary.place_of_largest(race * is_above)
                again = mx.where(last == i, likeliest, again)
            winner = mx.where(is_done, winner, again)
            is_done = is_done | (last == i)
        return winner


def _mix(h: mx.array) -> mx.array:
    return (h ^ (h >> 16)) * mx.array(0x85EBCA6B, mx.uint32)


def _uniform(h: mx.array) -> mx.array:
    """Uniform in (0, 1), never 0 or 1 in float32, from 32 bits that are half mixed."""
    h = (h ^ (h >> 13)) * mx.array(0xC2B2AE35, mx.uint32)
    h = h ^ (h >> 16)
    return ((h >> 9).astype(mx.float32) + 0.5) * 2.0**-23
