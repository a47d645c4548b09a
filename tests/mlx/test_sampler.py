"""The sampler draws from the right distribution, the same whatever shares the batch."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Sequence
from copy import copy
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_lm_server.protocol import SamplingParams
from mlx_lm_server.runner.backend import RowDraw
from mlx_lm_server.runner.sampling.row_sampling import RowSampling, start_row
from mlx_lm_server.runner.sampling.sampler import Sampler
from mlx_lm_server.runner.sampling.vocabulary import Vocabulary
from tests.back_ends import BACKEND

PROBABILITIES = np.array([0.4, 0.25, 0.15, 0.1, 0.05, 0.03, 0.02])
LOGITS = mx.array(np.log(PROBABILITIES).astype(np.float32))
NUM_DRAWS = 8000
NATIVE = BACKEND.draw
SAMPLERS = [None] if NATIVE is None else [None, NATIVE]


def params(seed: int = 0, **fields: object) -> SamplingParams:
    return SamplingParams(max_tokens=1, seed=seed, **fields)  # type: ignore[arg-type]


def row(
    vocab: int, prompt: Sequence[int] = (1,), output: Sequence[int] = (), **fields: object
) -> RowSampling:
    return start_row(params(**fields), prompt, output, vocab)


def sampler_with(vocab: int, native: RowDraw | None) -> Sampler:
    """Draws with arrays where `native` is None."""
    sampler = Sampler(vocab, BACKEND)
    sampler._native = native
    return sampler


def draw(logits: mx.array, rows: Sequence[RowSampling]) -> list[int]:
    """With arrays, and in C where it can be compiled: the same tokens."""
    vocab, again = logits.shape[-1], [replace(row, tally=copy(row.tally)) for row in rows]
    tokens: list[int] = sampler_with(vocab, None).sample(logits, rows).tolist()  # type: ignore[assignment]
    if NATIVE is not None:
        assert sampler_with(vocab, NATIVE).sample(logits, again).tolist() == tokens
    return tokens


def shares(num_draws: int = NUM_DRAWS, **fields: object) -> np.ndarray:
    """How often each token is drawn from LOGITS, over many seeds."""
    rows = [row(len(PROBABILITIES), seed=7919 * i + 3, **fields) for i in range(num_draws)]
    counts = Counter(draw(mx.broadcast_to(LOGITS[None], (num_draws, len(PROBABILITIES))), rows))
    return np.array([counts[i] for i in range(len(PROBABILITIES))]) / num_draws


def assert_close(actual: np.ndarray, expected: Sequence[float], num_draws: int = NUM_DRAWS) -> None:
    """Within four standard deviations of a binomial, each token."""
    target = np.array(expected) / np.sum(expected)
    deviation = np.sqrt(target * (1 - target) / num_draws)
    assert np.all(np.abs(actual - target) <= 4 * deviation + 1e-12), (actual, target)


def test_a_temperature_of_one_draws_the_softmax() -> None:
    assert_close(shares(), PROBABILITIES)


def test_a_higher_temperature_flattens() -> None:
    assert_close(shares(temperature=2.0), np.sqrt(PROBABILITIES))


@pytest.mark.parametrize(
    ("top_p", "num_kept"), [(0.05, 1), (0.4, 1), (0.41, 2), (0.7, 3), (0.9, 4), (0.97, 6), (1.0, 7)]
)
def test_top_p_keeps_the_smallest_set_that_reaches_the_mass(top_p: float, num_kept: int) -> None:
    assert_close(shares(top_p=top_p), [*PROBABILITIES[:num_kept], *[0.0] * (7 - num_kept)])


@pytest.mark.parametrize("top_k", [1, 2, 5, 7, 100])
def test_top_k_keeps_the_k_most_likely(top_k: int) -> None:
    kept = PROBABILITIES[:top_k]
    assert_close(shares(top_k=top_k), [*kept, *[0.0] * (7 - len(kept))])


def test_min_p_is_relative_to_the_most_likely() -> None:
    assert_close(shares(min_p=0.3), [0.4, 0.25, 0.15, 0, 0, 0, 0])


def test_top_p_counts_within_what_top_k_left() -> None:
    # Of 0.4, 0.25, 0.15 (sum 0.8) the nucleus of 0.6 is the first two: 0.4 < 0.48 <= 0.65.
    assert_close(shares(top_k=3, top_p=0.6), [0.4, 0.25, 0, 0, 0, 0, 0])


def test_top_p_over_a_flat_vocabulary_is_right_too() -> None:
    vocab = 4096
    logits = mx.array(np.linspace(1.0, 0.0, vocab, dtype=np.float32))
    weights = np.exp(np.linspace(1.0, 0.0, vocab))
    inside = int(np.searchsorted(np.cumsum(weights) / weights.sum(), 0.5)) + 1
    rows = [row(vocab, seed=i, top_p=0.5) for i in range(512)]
    tokens = np.array(draw(mx.broadcast_to(logits[None], (512, vocab)), rows))
    assert tokens.max() < inside
    expected_mean = (np.arange(inside) * weights[:inside]).sum() / weights[:inside].sum()
    assert abs(tokens.mean() - expected_mean) < 4 * tokens.std() / math.sqrt(512)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**64 - 1),
    top_p=st.sampled_from([0.1, 0.5, 0.9, 1.0]),
    top_k=st.sampled_from([0, 3, 50]),
    min_p=st.sampled_from([0.0, 0.05]),
    temperature=st.sampled_from([0.0, 0.3, 1.0, 1.7]),
    mates=st.lists(
        st.tuples(
            st.integers(0, 99),
            st.sampled_from([0.0, 0.7]),
            st.sampled_from([0.3, 1.0]),
            st.sampled_from([0, 9]),
        ),
        max_size=4,
    ),
    place=st.integers(0, 4),
)
def test_a_row_draws_the_same_token_whatever_shares_the_batch(
    seed: int,
    top_p: float,
    top_k: int,
    min_p: float,
    temperature: float,
    mates: list[tuple[int, float, float, int]],
    place: int,
) -> None:
    vocab = 300
    mx.random.seed(seed % 1000)
    logits = mx.random.normal((len(mates) + 1, vocab)) * 3

    def mine() -> RowSampling:
        return row(vocab, seed=seed, top_p=top_p, top_k=top_k, min_p=min_p, temperature=temperature)

    place = min(place, len(mates))
    rows = [row(vocab, seed=s, temperature=t, top_p=p, top_k=k) for s, t, p, k in mates]
    rows.insert(place, mine())
    assert draw(logits, rows)[place] == draw(logits[place : place + 1], [mine()])[0]


@pytest.mark.parametrize("native", SAMPLERS)
def test_the_index_of_the_token_changes_the_draw_and_a_restart_does_not(
    native: RowDraw | None,
) -> None:
    vocab = 1000
    logits = mx.zeros((1, vocab))
    sampler = sampler_with(vocab, native)
    going_on = row(vocab, prompt=(1, 2), seed=5)
    tokens = [sampler.sample(logits, [going_on]).item() for _ in range(6)]
    assert len(set(tokens)) > 3
    resumed = row(vocab, prompt=(1, 2), output=tokens[:3], seed=5)
    assert [sampler.sample(logits, [resumed]).item() for _ in range(3)] == tokens[3:]


def test_penalties_are_those_of_openai_and_ctrl() -> None:
    logits = mx.array([[2.0, -1.0, 1.5, 1.4]])
    assert draw(
        logits, [row(4, prompt=(3,), output=(0, 0), temperature=0.0, frequency_penalty=0.3)]
    ) == [2]
    assert draw(logits, [row(4, prompt=(0,), temperature=0.0, frequency_penalty=2.0)]) == [0]
    assert draw(logits, [row(4, output=(0, 0), temperature=0.0, presence_penalty=0.4)]) == [0]
    assert draw(logits, [row(4, output=(0,), temperature=0.0, presence_penalty=0.6)]) == [2]
    # Repetition counts the prompt too: 2.0 / 1.5 = 1.33 falls below 1.4.
    assert draw(logits, [row(4, prompt=(0, 2), temperature=0.0, repetition_penalty=1.5)]) == [3]
    # A negative logit moves away from zero: -1.0 * 1.5 = -1.5 falls below -1.2.
    negative = mx.array([[-1.0, -1.2]])
    assert draw(negative, [row(2, prompt=(0,), temperature=0.0, repetition_penalty=1.5)]) == [1]


def test_a_row_that_joins_again_has_its_prompt_scored_already() -> None:
    assert row(4, prompt=(1, 2), prompt_logprobs=1).prompt_scores is not None
    assert row(4, prompt=(1, 2), output=(3,), prompt_logprobs=1).prompt_scores is None


@pytest.mark.parametrize("native", SAMPLERS)
def test_penalties_follow_the_tokens_that_are_drawn(native: RowDraw | None) -> None:
    sampler = sampler_with(3, native)
    punished = row(3, temperature=0.0, frequency_penalty=1.0)
    logits = mx.array([[1.5, 1.0, 0.0]])
    assert [sampler.sample(logits, [punished]).item() for _ in range(4)] == [0, 1, 0, 1]


def test_logit_bias_forbids_and_forces() -> None:
    logits = mx.array([[2.0, 1.0, 0.0]])
    assert draw(logits, [row(3, temperature=0.0, logit_bias={0: -100.0})]) == [1]
    assert draw(logits, [row(3, seed=9, logit_bias={2: 100.0})]) == [2]


def test_nothing_but_allowed_tokens_is_drawn() -> None:
    allowed = (2, 4, 5)
    found = shares(allowed_token_ids=allowed)
    assert_close(found, [p if i in allowed else 0 for i, p in enumerate(PROBABILITIES)])
    rows = [row(7, temperature=0.0, allowed_token_ids=allowed, logit_bias={0: 100.0})]
    assert draw(LOGITS[None], rows) == [2]


def test_bad_words_are_not_drawn() -> None:
    found = shares(bad_words=((0,), (2,), (1, 4)))
    assert_close(found, [0 if i in (0, 2) else p for i, p in enumerate(PROBABILITIES)])
    words = ((0, 1), (0, 0), (3, 0, 2))
    for output, expected in (((), 0), ((0,), 2), ((3, 0), 3), ((1, 0), 2)):
        assert draw(LOGITS[None], [row(7, output=output, temperature=0.0, bad_words=words)]) == [
            expected
        ]


@pytest.mark.parametrize("how", [{"temperature": 0.0}, {"temperature": 1.3}], ids=str)
def test_where_bad_words_leave_nothing_an_allowed_token_comes(how: dict[str, float]) -> None:
    rows = [
        row(7, seed=seed, output=(0,), allowed_token_ids=(4, 5), bad_words=((0, 4), (5,)), **how)
        for seed in range(40)
    ]
    assert set(draw(mx.broadcast_to(LOGITS[None], (40, 7)), rows)) <= {4, 5}


def test_greedy_and_drawing_rows_share_a_batch() -> None:
    logits = mx.broadcast_to(LOGITS[None], (3, 7))
    rows = [row(7, temperature=0.0), row(7, seed=1, logit_bias={6: 50.0}), row(7, temperature=0.0)]
    assert draw(logits, rows) == [0, 6, 0]


def test_a_large_vocabulary_is_drawn_from_alike_with_arrays_and_in_c() -> None:
    """`draw` compares the two; widths around the lanes of the C code and the stacks of arrays."""
    rng = random.Random(7)
    for vocab in (63, 64, 65, 500, 1531, 8192, 32001):
        mx.random.seed(vocab)
        logits = mx.random.normal((12, vocab)) * rng.uniform(0.5, 4)
        rows = [
            row(
                vocab,
                seed=rng.getrandbits(64),
                temperature=rng.choice((0.0, 0.4, 1.0, 1.5)),
                top_p=rng.choice((0.0, 0.1, 0.7, 0.95, 1.0)),
                top_k=rng.choice((0, 0, 1, 40)),
                min_p=rng.choice((0.0, 0.02)),
            )
            for _ in range(12)
        ]
        assert all(0 <= token < vocab for token in draw(logits, rows))


@pytest.mark.skipif(NATIVE is None, reason="nothing can be compiled here")
def test_logits_that_are_no_numbers_draw_some_token_and_do_not_hang() -> None:
    for value in (mx.nan, mx.inf, -mx.inf):
        logits = mx.full((3, 100), value)
        rows = [
            row(100, top_p=0.5, top_k=3),
            row(100, temperature=0.0),
            row(100, top_p=0.0, min_p=0.1),
        ]
        tokens = sampler_with(100, NATIVE).sample(logits, rows).tolist()
        assert all(0 <= token < 100 for token in tokens)  # type: ignore[union-attr]


@pytest.mark.parametrize("size", [1, 7, 64, 97, 300, 8192])
def test_stacked_reductions_are_those_over_the_vocabulary(size: int) -> None:
    values = mx.random.normal((5, size))
    vocabulary = Vocabulary(size, BACKEND.policy.reduction_depth)
    assert mx.array_equal(vocabulary.largest(values), values.max(axis=-1, keepdims=True))
    places = mx.argmax(values, axis=-1, keepdims=True)
    assert mx.array_equal(vocabulary.place_of_largest(values), places)
    bars = mx.sort(values, axis=-1)[:, :: max(1, size // 3)]
    above = values[:, None] * (values[:, None] > bars[..., None])
    assert mx.allclose(vocabulary.masses_above(values, bars), above.sum(axis=-1), atol=1e-3)
