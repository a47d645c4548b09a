"""Typical sampling, XTC and a least number of tokens, beside rows that want none of it."""

from __future__ import annotations

import random

import mlx.core as mx
import numpy as np
import pytest

from tests.mlx.test_sampler import LOGITS, PROBABILITIES, assert_close, draw, row, shares

VOCAB = len(PROBABILITIES)


def typical_reference(p: np.ndarray, mass: float) -> np.ndarray:
    """Meister et al. 2022, in numpy."""
    information = -np.log(p)
    order = np.argsort(np.abs(information - (p * information).sum()), kind="stable")
    kept = order[: int(np.searchsorted(np.cumsum(p[order]), mass)) + 1]
    found = np.zeros_like(p)
    found[kept] = p[kept] / p[kept].sum()
    return found


@pytest.mark.parametrize("mass", [0.2, 0.5, 0.9])
def test_typical_sampling_keeps_what_carries_the_mean_information(mass: float) -> None:
    assert_close(shares(typical_p=mass), list(typical_reference(PROBABILITIES, mass)))


def test_xtc_leaves_only_the_least_likely_of_the_top_choices() -> None:
    left = np.array([0, 0, 0.15, 0.1, 0.05, 0.03, 0.02])
    assert_close(shares(xtc_probability=1.0, xtc_threshold=0.12), list(left / left.sum()))


def test_xtc_applies_as_often_as_it_is_asked_to() -> None:
    left = np.array([0, 0.25, 0.15, 0.1, 0.05, 0.03, 0.02])
    expected = 0.5 * PROBABILITIES + 0.5 * left / left.sum()
    assert_close(shares(xtc_probability=0.5, xtc_threshold=0.2), list(expected))


def test_xtc_with_one_top_choice_changes_nothing() -> None:
    assert_close(shares(xtc_probability=1.0, xtc_threshold=0.3), list(PROBABILITIES))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_no_stop_token_comes_before_the_least_number_of_tokens(temperature: float) -> None:
    fields = {"min_tokens": 2, "stop_token_ids": (0, 1), "temperature": temperature}
    rows = [row(VOCAB, output=[3] * n, seed=i, **fields) for i in range(50) for n in range(3)]
    tokens = draw(mx.broadcast_to(LOGITS[None], (len(rows), VOCAB)), rows)
    early = [token for place, token in enumerate(tokens) if place % 3 < 2]
    late = tokens[2::3]
    assert not {0, 1} & set(early)
    assert {0, 1} & set(late)


def test_a_rows_token_does_not_depend_on_what_the_others_ask_for() -> None:
    rng = random.Random(3)
    kinds: list[dict[str, object]] = [
        {},
        {"temperature": 0.0},
        {"typical_p": 0.6},
        {"xtc_probability": 0.7, "xtc_threshold": 0.1},
        {"min_tokens": 3, "stop_token_ids": (0,)},
        {"typical_p": 0.9, "xtc_probability": 1.0, "top_k": 5, "top_p": 0.9, "min_p": 0.01},
        {"frequency_penalty": 1.0, "logit_bias": {2: 1.5}},
    ]
    for _ in range(200):
        chosen = [rng.choice(kinds) for _ in range(rng.randint(1, 9))]
        seeds = [rng.getrandbits(64) for _ in chosen]
        logits = mx.array(
            np.random.default_rng(rng.getrandbits(32)).normal(size=(len(chosen), VOCAB))
        )
        rows = [row(VOCAB, seed=s, **kind) for s, kind in zip(seeds, chosen, strict=True)]
        together = draw(logits, rows)
        place = rng.randrange(len(chosen))
        alone = draw(logits[place : place + 1], [row(VOCAB, seed=seeds[place], **chosen[place])])
        assert alone == [together[place]]
