"""Samplers that drop candidates by shape of the distribution, for the rows that ask for them.

Weights are `[n, vocab]`, in proportion to probabilities; what is dropped becomes 0.
"""

from __future__ import annotations

import mlx.core as mx


def keep_typical(weights: mx.array, typical_p: mx.array) -> mx.array:
    """Locally typical sampling (Meister et al. 2022): the tokens whose information is nearest to
    the mean, up to the mass `typical_p` `[n, 1]`."""
    p = weights / weights.sum(axis=-1, keepdims=True)
    information = -mx.log(mx.maximum(p, 1e-30))
    entropy = (p * information).sum(axis=-1, keepdims=True)
    distance = mx.where(p > 0, mx.abs(information - entropy), mx.inf)
    order = mx.argsort(distance, axis=-1)
    sorted_p = mx.take_along_axis(p, order, axis=-1)
    mass_before = mx.cumsum(sorted_p, axis=-1) - sorted_p
    kept = mx.put_along_axis(
        mx.zeros_like(p), order, mx.where(mass_before < typical_p, 1.0, 0.0), -1
    )
    return weights * kept


def exclude_top_choices(weights: mx.array, threshold: mx.array) -> mx.array:
    """XTC: of the tokens at or above the probability `threshold` `[n, 1]` only the least likely
    stays, so that one that is good enough but not obvious comes."""
    p = weights / weights.sum(axis=-1, keepdims=True)
    is_top = p >= threshold
    least = mx.where(is_top, p, mx.inf).min(axis=-1, keepdims=True)
    return mx.where(is_top & (p > least), 0.0, weights)
