"""Top-p without a sort: which token of a race wins among those of the nucleus.

A token is in the nucleus if the mass of all more likely ones is below top_p. So the winner is the
race's best among the tokens that weigh enough, and whether a token does one masked sum decides. Few
tokens need be asked about. The best of a race are drawn from all candidates one after the other, so
each is in the nucleus with a probability of top_p at least, and in a list of some tens it is next
to certain that one is. The least weight of the list that is in the nucleus is a bar that keeps the
winner and lets nothing in from outside. Asking about three weights at once leaves a quarter of the
list, and so on until one is left.

Where top_p is tiny that list would be long, but then the nucleus is small: it has no larger share
of the tokens than of the mass. There the likeliest tokens are listed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, log, log1p

import mlx.core as mx

from mlx_lm_server.runner.bounded_compile import BoundedCompile
from mlx_lm_server.runner.sampling.vocabulary import Vocabulary, among_the_largest

MISS_PROBABILITY = 1e-6
# Parts of a list, of which one is left when it was asked where the nucleus ends.
PARTS = 4


@dataclass(frozen=True, slots=True)
class Nucleus:
    """How the rows of a step are searched. `share` is top_p, or infinite where it is off, and
    `below_all` less than any weight, as columns `[n, 1]`. Lists have `size` places, best last, of
    which `is_listed` `[n, size]` are those that a row takes. `by_weight` `[n, 1]` says whose list
    has the likeliest tokens; None where nobody's."""

    size: int
    share: mx.array
    below_all: mx.array
    is_listed: mx.array
    by_weight: mx.array | None


def nucleus_of(top_ps: Sequence[float], vocab_size: int) -> Nucleus | None:
    """Returns None where top_p is off for all."""
    if all(top_p >= 1.0 for top_p in top_ps):
        return None
    lists = [_list_of(top_p, vocab_size) for top_p in top_ps]
    size = max(places for places, _ in lists)
    return Nucleus(
        size=size,
        share=mx.array([[top_p if top_p < 1.0 else mx.inf] for top_p in top_ps]),
        below_all=mx.array([[-1.0]] * len(lists)),
        is_listed=mx.arange(size)[None] > mx.array([[size - places] for places, _ in lists]),
        by_weight=mx.array([[own] for _, own in lists]) if any(own for _, own in lists) else None,
    )


def _list_of(top_p: float, vocab_size: int) -> tuple[int, bool]:
    """Returns how many places the list of a row has, a power of four of which one stays free, and
    whether it has the likeliest tokens. It depends on this row alone, and so does its token."""
    if top_p >= 1.0:
        return PARTS, False
    likeliest = _places(ceil(top_p * vocab_size) + 2)
    if top_p * vocab_size < 1.0:
        return likeliest, True
    racers = _places(ceil(log(MISS_PROBABILITY) / log1p(-top_p)))
    return min(racers, likeliest), likeliest < racers


def _places(num: int) -> int:
    places = PARTS
    while places <= num:
        places *= PARTS
    return places


class NucleusSearch:
    """Owned by the race."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._list = BoundedCompile(lambda is_listed, weights: mx.where(is_listed, weights, mx.inf))
        self._part = BoundedCompile(_part)
        self._keep = BoundedCompile(_keep)

    def within(self, nucleus: Nucleus, weights: mx.array, race: mx.array) -> mx.array:
        """Returns the race `[n, vocab]` with its largest value where the best of the nucleus is.
        With a probability below 1e-6 no token of a list is in the nucleus; then the largest value
        is the likeliest token's."""
        bars = self._listed(nucleus, weights, race)
        total: mx.array | None = None
        while (size := bars.shape[1]) > 1:
            step = size // PARTS
            asked = bars[:, step - 1 : -1 : step]
            if total is None:
                asked = mx.concatenate([asked, nucleus.below_all], axis=1)
            found = self._vocabulary.masses_above(weights, asked)
            masses = [found[:, i : i + 1] for i in range(found.shape[1])]
            if total is None:
                total = masses.pop()
            parts = [bars[:, i * step : (i + 1) * step] for i in range(PARTS)]
            bars = self._part(nucleus.share, total, *masses, *parts)
        return self._keep(race, weights, bars)

    def _listed(self, nucleus: Nucleus, weights: mx.array, race: mx.array) -> mx.array:
        """Returns weights `[n, size]`, ascending, with infinity behind them."""
        keys, size = race, nucleus.size
        if nucleus.by_weight is not None:
            keys = mx.where(nucleus.by_weight, weights, race)
        keys, found = among_the_largest(keys, size, keys, weights)
        order = mx.argsort(keys, axis=-1)[:, -size:]
        found = mx.take_along_axis(found, order, axis=-1)
        if (num_missing := size - found.shape[1]) > 0:
            found = mx.pad(found, [(0, 0), (num_missing, 0)], constant_values=mx.inf)
        return mx.sort(self._list(nucleus.is_listed, found), axis=-1)


def _part(
    share: mx.array,
    total: mx.array,
    low: mx.array,
    middle: mx.array,
    high: mx.array,
    *parts: mx.array,
) -> mx.array:
    """Returns the part that ends with the least weight in the nucleus, of those whose last ones,
    but for the last part's, have these masses above them."""
    limit = share * total
    upper = mx.where(high < limit, parts[2], parts[3])
    return mx.where(low < limit, parts[0], mx.where(middle < limit, parts[1], upper))


def _keep(race: mx.array, weights: mx.array, bar: mx.array) -> mx.array:
    return mx.where(bar == mx.inf, weights, mx.where(weights >= bar, race, 0.0))
