"""The draw itself, for all rows at once: a race that each row runs with noise of its own.

Gumbel-max (Gumbel 1954) as exponential races: the token with the largest p / E wins, E ~ Exp(1)
hashed from the row's key and the token id. Who wins among fewer tokens is who leads among them;
`nucleus.py` says which those are for top-p.

What it costs is passes over `[rows, vocab]`, and on GPUs kernels: as much as `mx.compile` takes at
once is one.
"""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx

from mlx_lm_server.runner.backend import Unary
from mlx_lm_server.runner.bounded_compile import BoundedCompile
from mlx_lm_server.runner.sampling.nucleus import Nucleus, NucleusSearch
from mlx_lm_server.runner.sampling.vocabulary import Vocabulary


class Race:
    """Draws one token for each row from its weights. Owned by the sampler."""

    def __init__(self, vocabulary: Vocabulary, log: Unary) -> None:
        self._vocabulary = vocabulary
        self._search = NucleusSearch(vocabulary)
        self._spread_ids = mx.arange(vocabulary.size, dtype=mx.uint32)[None] * 0x9E3779B1
        self._hash = BoundedCompile(lambda ids, first, second: _mix(ids + first) + second)
        self._run = BoundedCompile(lambda weights, h: -weights / log(_uniform(h)))

    def draw(self, weights: mx.array, keys: Sequence[int], nucleus: Nucleus | None) -> mx.array:
        """Weights `[n, vocab]` in proportion to probabilities, and 64-bit keys → token ids `[n]`
        int32, of the nuclei where there are any."""
        first = mx.array([[key >> 32] for key in keys], mx.uint32)
        second = mx.array([[key & 0xFFFFFFFF] for key in keys], mx.uint32)
        # 32 bits for each row and token, but for the last mixing in `_uniform` (MurmurHash3's
        # finaliser, Appleby 2011, with the key's two words added).
        race = self._run(weights, self._hash(self._spread_ids, first, second))
        if nucleus is not None:
            race = self._search.within(nucleus, weights, race)
        return self._vocabulary.place_of_largest(race)[:, 0].view(mx.int32)


def _mix(h: mx.array) -> mx.array:
    return (h ^ (h >> 16)) * mx.array(0x85EBCA6B, mx.uint32)


def _uniform(h: mx.array) -> mx.array:
    """Uniform in (0, 1), never 0 or 1 in float32, from 32 bits that are half mixed."""
    h = (h ^ (h >> 13)) * mx.array(0xC2B2AE35, mx.uint32)
    h = h ^ (h >> 16)
    return ((h >> 9).astype(mx.float32) + 0.5) * 2.0**-23
