"""Attention reads and writes no further than it is told, and believes nothing that cannot be."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from mlx_lm_server.runner.state.step_layout import Span
from tests.native.door import INT_MAX, TRANS, Attention, Floats, needs_library

pytestmark = needs_library

DECODES = tuple(Span(slot, slot, 1, start) for slot, start in ((0, 0), (1, 69), (2, 33)))
CHUNK = (Span(1, 0, 20, 33),)
BOTH = (Span(2, 0, 1, 64), Span(0, 1, 37, 33), Span(1, 38, 1, 1))
SPANS = pytest.mark.parametrize("spans", [DECODES, CHUNK, BOTH], ids=["decodes", "chunk", "both"])


def with_new(attention: Attention) -> tuple[Floats, Floats]:
    """K and V after the new ones are written."""
    keys, values = attention.keys.copy(), attention.values.copy()
    facts = attention.facts
    if attention.new is not None:
        new = attention.new.reshape(2, facts.num_tokens, facts.kv_heads, -1)
        for slot, first, num, start in attention.spans:
            for tokens, plane in zip(new, (keys, values), strict=True):
                rows = tokens[first : first + num, :, : plane.shape[-1]].swapaxes(0, 1)
                plane[slot, :, start : start + num] = rows
    return keys, values


def expected(attention: Attention) -> Floats:
    facts, (keys, values) = attention.facts, with_new(attention)
    out = np.zeros((*attention.queries.shape[:2], facts.value_dim))
    for slot, first, num, start in attention.spans:
        for token in range(num):
            end = start + token + 1
            places = [p % facts.capacity for p in range(end)][-min(end, facts.capacity) :]
            places = places[-facts.window :] if facts.window else places
            for head in range(facts.kv_heads * facts.share):
                query = attention.queries[first + token, head, : facts.key_dim]
                kv_head = head // facts.share
                scores = keys[slot, kv_head, places] @ query * facts.key_dim**-0.5
                weights = np.exp(scores)
                sink = 0.0 if attention.sinks is None else np.exp(attention.sinks[head])
                mixed = weights @ values[slot, kv_head, places]
                out[first + token, head] = mixed / (weights.sum() + sink)
    return out.astype(np.float32)


@SPANS
@pytest.mark.parametrize("dims", [(16, 16), (12, 7), (24, 40), (64, 64)])
@pytest.mark.parametrize(("window", "share"), [(0, 1), (10, 2), (100, 9)])
@pytest.mark.parametrize("more", [False, True])
def test_tokens_of_a_slab(
    spans: tuple[Span, ...], dims: tuple[int, int], window: int, share: int, more: bool
) -> None:
    """And, if there is more, sinks and new K and V."""
    attention = Attention.of(
        spans, dims=dims, window=window, share=share, has_sinks=more, has_new=more
    )
    wanted, (keys, values) = expected(attention), with_new(attention)
    assert np.allclose(attention.answer(), wanted, atol=1e-4)
    assert np.array_equal(attention.keys, keys)
    assert np.array_equal(attention.values, values)


@pytest.mark.parametrize("start", [70, 75, 139, 140, 1000])
@pytest.mark.parametrize("dims", [(16, 16), (12, 7)])
def test_tokens_that_look_around_the_end_of_their_ring(start: int, dims: tuple[int, int]) -> None:
    attention = Attention.of((Span(2, 0, 1, start),), dims=dims, window=30)
    wanted = expected(attention)
    assert np.allclose(attention.answer(), wanted, atol=1e-4)


def test_many_tokens_whom_threads_share() -> None:
    attention = Attention.of((Span(0, 0, 100, 0),), capacity=100, dims=(16, 16), kv_heads=4)
    wanted = expected(attention)
    assert np.allclose(attention.answer(), wanted, atol=1e-4)


LIES: list[dict[str, int]] = [
    {name: value}
    for name, values in {
        "num_spans": (-1, 2, 100, INT_MAX),
        "num_slots": (0, -1, 1),
        "kv_heads": (0, -1, 1, 3, INT_MAX),
        "capacity": (0, -1, 52),
        "key_dim": (0, -16, 17, INT_MAX),
        "value_dim": (0, -16, 17, INT_MAX),
        "share": (0, -1, 1, 3, INT_MAX),
        "window": (-1, -INT_MAX),
        "sinks_at": (1, 16, -1, 47, 10_000, INT_MAX, -INT_MAX),
        "first_row": (0, -1, 1, 4, 10_000, INT_MAX, -INT_MAX),
        "num_tokens": (0, -1, 19, 21, INT_MAX),
        "has_new": (1, -1),
    }.items()
    for value in values
] + [
    {"num_slots": INT_MAX, "capacity": INT_MAX},
    {"num_slots": INT_MAX, "capacity": INT_MAX, "kv_heads": 4, "share": 1},
    {"kv_heads": INT_MAX, "share": INT_MAX},
    {"kv_heads": 2**16, "share": 2**16},
    {"kv_heads": 1, "share": 4, "has_new": 1},
    {"share": 0, "has_new": 1},
    {"first_row": -2, "num_tokens": 21},
    {"first_row": 86, "num_tokens": -1, "num_spans": 0},
]


def assert_refused(attention: Attention, **odd: Any) -> None:
    keys, values = attention.keys.copy(), attention.values.copy()
    call = replace(attention.call(), **odd)
    call.run()
    assert call.c is not None
    assert np.isnan(call.c[: call.m * call.ldc]).all()
    assert np.array_equal(attention.keys, keys)
    assert np.array_equal(attention.values, values)


@pytest.mark.parametrize("lie", LIES, ids=str)
def test_facts_that_cannot_be_give_nan(lie: dict[str, int]) -> None:
    assert_refused(Attention.of(CHUNK).lying(**lie))


@pytest.mark.parametrize(
    "lie",
    [
        {"has_new": 0},
        {"num_tokens": 21},
        {"sinks_at": 16},
        {"sinks_at": 45},
        {"kv_heads": 3},
    ],
    ids=str,
)
def test_facts_of_sinks_and_new_tokens_that_cannot_be_give_nan(lie: dict[str, int]) -> None:
    attention = Attention.of(CHUNK, has_sinks=True, has_new=True)
    assert attention.facts.sinks_at == 32
    assert_refused(attention.lying(**lie))


@pytest.mark.parametrize(
    "spans",
    [
        (Span(-1, 0, 20, 33),),
        (Span(3, 0, 20, 33),),
        (Span(INT_MAX, 0, 20, 33),),
        (Span(1, -1, 20, 33),),
        (Span(1, 1, 20, 33),),
        (Span(1, INT_MAX, 20, 33),),
        (Span(1, 0, 0, 33),),
        (Span(1, 0, -1, 33),),
        (Span(1, 0, 21, 33),),
        (Span(1, 0, INT_MAX, 33),),
        (Span(1, 0, 20, -1),),
        (Span(1, 0, 20, 51),),
        (Span(1, 0, 20, INT_MAX),),
        (Span(1, 0, 1, 70),),
        (Span(1, 0, 1, INT_MAX),),
    ],
    ids=str,
)
@pytest.mark.parametrize("has_new", [False, True])
def test_a_span_outside_of_the_tokens_or_of_the_slab_gives_nan(
    spans: tuple[Span, ...], has_new: bool
) -> None:
    assert_refused(replace(Attention.of(CHUNK, has_new=has_new), spans=spans))


def test_a_span_whose_end_is_no_number_any_more_gives_nan_in_a_ring_too() -> None:
    for span in (Span(1, 0, 1, INT_MAX), Span(1, 0, 2, 69), Span(1, 0, 20, INT_MAX - 5)):
        assert_refused(replace(Attention.of(CHUNK, window=30), spans=(span,)))


def test_a_token_in_two_spans_gives_nan() -> None:
    twice = (Span(0, 0, 2, 0), Span(1, 1, 2, 0))
    assert_refused(Attention.of(twice))


@pytest.mark.parametrize(
    "odd",
    [{"k": 7}, {"k": 9}, {"lda": 9}, {"ldb": 17}, {"trans_a": TRANS}, {"trans_b": TRANS}, {"m": 1}],
    ids=str,
)
def test_a_call_of_another_form_gives_nan(odd: dict[str, Any]) -> None:
    assert_refused(Attention.of(CHUNK), **odd)


@pytest.mark.parametrize(("m", "n"), [(1, 1), (3, 4), (1, 12)])
def test_rows_too_few_for_any_facts_give_nan(m: int, n: int) -> None:
    attention = Attention.of(CHUNK)
    c = np.zeros(m * n, np.float32)
    assert_refused(attention, m=m, n=n, ldb=n, ldc=n, c=c)
