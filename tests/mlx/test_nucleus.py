"""The nucleus is found without a sort, and the largest of the vocabulary are among few."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_lm_server.runner.sampling.nucleus import NucleusSearch, nucleus_of
from mlx_lm_server.runner.sampling.vocabulary import Vocabulary, among_the_largest, floors

SIZES = (1, 2, 7, 64, 97, 300, 1531, 4096, 8209)
# Powers of two, so that masses and limits are exact.
SHARES = (0.0, 1e-9, 2**-12, 2**-7, 2**-4, 0.25, 0.5, 0.75, 0.9375, 1 - 2**-8, 1.0)


def winner(weights: np.ndarray, race: np.ndarray, top_p: float) -> int:
    """The race's best of the nucleus, by its definition; the likeliest where there is none."""
    order = np.argsort(-weights, kind="stable")
    mass = np.concatenate([[0.0], np.cumsum(weights[order])])
    heavier = np.searchsorted(-weights[order], -weights[order])
    is_in = np.zeros(len(weights), bool)
    is_in[order] = (mass[heavier] < top_p * mass[-1]) | (top_p >= 1.0)
    return int(np.argmax(np.where(is_in, race, -1.0) if is_in.any() else weights))


def whole_weights(rng: np.random.Generator, shape: tuple[int, int], kind: int) -> np.ndarray:
    """Whole numbers of which sums are exact: many alike, few heavy, or next to flat."""
    if kind == 0:
        return rng.integers(0, 4, shape) + 0.0
    if kind == 1:
        return np.floor(rng.pareto(0.7, shape)).clip(0, 500)
    return rng.integers(90, 100, shape) + 0.0


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    size=st.sampled_from(SIZES),
    shares=st.lists(st.sampled_from(SHARES), min_size=1, max_size=5),
    kind=st.integers(0, 2),
)
def test_the_best_of_the_nucleus_wins_whatever_the_others_ask_for(
    seed: int, size: int, shares: list[float], kind: int
) -> None:
    rng = np.random.default_rng(seed)
    weights = whole_weights(rng, (len(shares), size), kind)
    weights[:, rng.integers(size)] += 1.0
    # A race as draws make it: the list is long enough for what is drawn in proportion.
    race = weights / rng.exponential(size=weights.shape)
    if (nucleus := nucleus_of(shares, size)) is None:
        return
    search = NucleusSearch(Vocabulary(size, 1))
    values = (mx.array(array.astype(np.float32)) for array in (weights, race))
    found = mx.argmax(search.within(nucleus, *values), axis=-1).tolist()
    assert found == [
        winner(own.astype(np.float32), run.astype(np.float32), share)
        for own, run, share in zip(weights, race, shares, strict=True)
    ]


@pytest.mark.parametrize("top_p", [5e-324, 1e-50, 1.0 - 2**-53])
def test_the_smallest_and_the_largest_shares_have_a_list(top_p: float) -> None:
    nucleus = nucleus_of([top_p], 151_936)
    assert nucleus is not None
    assert nucleus.size == 4


def test_lists_are_as_long_as_a_miss_is_unlikely() -> None:
    sizes = {0.995: 4, 0.95: 16, 0.8: 16, 0.5: 64, 0.1: 256, 0.02: 1024, 0.001: 256}
    for top_p, size in sizes.items():
        nucleus = nucleus_of([1.0, top_p], 151_936)
        assert nucleus is not None
        assert nucleus.size == size
        assert (nucleus.by_weight is not None) == (top_p == 0.001)


def of_rows(values: mx.array, places: Sequence[int]) -> list[float]:
    return [float(values[row, place].item()) for row, place in enumerate(places)]


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    size=st.sampled_from(SIZES),
    ks=st.lists(st.integers(1, 8209), min_size=1, max_size=4),
    num_values=st.sampled_from([2, 30, 10**6]),
)
def test_the_kth_largest_is_found_with_many_alike_too(
    seed: int, size: int, ks: list[int], num_values: int
) -> None:
    rng = np.random.default_rng(seed)
    ks = [min(k, size) for k in ks]
    values = mx.array(rng.integers(0, num_values, (len(ks), size)).astype(np.float32))
    ordered = mx.sort(values, axis=-1)
    assert floors(values, ks).flatten().tolist() == of_rows(ordered, [size - k for k in ks])


@pytest.mark.parametrize(("size", "num"), [(151_936, 16), (151_936, 1000), (8209, 20), (1531, 1)])
def test_the_largest_are_among_few_and_other_arrays_stand_beside_them(size: int, num: int) -> None:
    values = mx.stack([mx.random.normal((size,)), mx.arange(size) / size, -mx.arange(size) / size])
    keys, others = among_the_largest(values, num, values, 2 * values)
    assert keys.shape[1] < size / 2
    assert mx.array_equal(others, 2 * keys)
    assert mx.array_equal(mx.sort(keys, axis=-1)[:, -num:], mx.sort(values, axis=-1)[:, -num:])
