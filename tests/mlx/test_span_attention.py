"""Attention in C gives what attention is, and a token the same bits whatever is beside it."""

from __future__ import annotations

import sys

import mlx.core as mx
import numpy as np
import pytest

from mlx_lm_server.runner.backends.x86 import span_attention
from mlx_lm_server.runner.backends.x86.kernel import CpuKernel
from mlx_lm_server.runner.backends.x86.span_attention import Part, Span
from tests.back_ends import needs_native

pytestmark = needs_native

SCALE = 0.125


def _slice_of_slab(kv_heads: int, num_keys: int, dim: int) -> mx.array:
    """As storage gives it: rows one after the other, heads apart; the last slot of its slab."""
    slab = mx.random.normal((2, kv_heads, num_keys + 5, dim))
    return slab[1, :, :num_keys]


def _queries(heads: int, length: int, dim: int) -> mx.array:
    return mx.random.normal((length, heads, dim)).swapaxes(0, 1)


def _attend(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    start: int,
    window: int | None = None,
    sinks: mx.array | None = None,
    scale: float = SCALE,
) -> mx.array:
    return span_attention.attend_chunk(q, k, v, scale, start, window, sinks)


def _expected(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    start: int,
    window: int | None,
    sinks: mx.array | None,
) -> np.ndarray:
    share = q.shape[0] // k.shape[0]
    queries = np.array(q, np.float64)
    keys, values = (np.repeat(np.array(x, np.float64), share, axis=0) for x in (k, v))
    scores = SCALE * queries @ keys.swapaxes(1, 2)
    ages = start + np.arange(q.shape[1])[:, None] - np.arange(k.shape[1])
    scores[:, (ages < 0) | (ages >= (window or sys.maxsize))] = -np.inf
    top = scores.max(axis=-1, keepdims=True)
    weights = np.exp(scores - top)
    total = weights.sum(axis=-1, keepdims=True)
    if sinks is not None:
        total += np.exp(np.array(sinks, np.float64)[:, None, None] - top)
    return weights / total @ values


@pytest.mark.parametrize("has_sinks", [False, True])
@pytest.mark.parametrize("window", [None, 1, 50, 200])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "length", "start", "key_dim", "value_dim"),
    [
        (8, 4, 2, 0, 64, 64),
        (8, 4, 1, 9, 64, 64),
        (8, 4, 20, 300, 64, 64),
        (8, 2, 130, 65, 64, 64),
        (14, 2, 9, 127, 64, 64),
        (8, 1, 33, 64, 128, 128),
        (80, 1, 3, 61, 64, 64),
        (4, 4, 70, 190, 40, 24),
        (2, 1, 257, 0, 256, 256),
    ],
)
def test_it_is_attention(
    heads: int,
    kv_heads: int,
    length: int,
    start: int,
    key_dim: int,
    value_dim: int,
    window: int | None,
    has_sinks: bool,
) -> None:
    q = _queries(heads, length, key_dim)
    k = _slice_of_slab(kv_heads, start + length, key_dim)
    v = _slice_of_slab(kv_heads, start + length, value_dim)
    sinks = mx.random.normal((heads,)) if has_sinks else None
    out = _attend(q, k, v, start, window, sinks)
    assert np.abs(np.array(out) - _expected(q, k, v, start, window, sinks)).max() < 1e-5


@pytest.mark.parametrize("window", [None, 70])
@pytest.mark.parametrize("has_sinks", [False, True])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "key_dim", "value_dim"),
    [(6, 2, 64, 64), (2, 2, 80, 48), (5, 1, 48, 80), (8, 1, 128, 128), (9, 1, 16, 16)],
)
def test_a_prompt_cut_anywhere_gives_the_same_bits(
    heads: int, kv_heads: int, key_dim: int, value_dim: int, window: int | None, has_sinks: bool
) -> None:
    length = 211
    q = _queries(heads, length, key_dim)
    k, v = _slice_of_slab(kv_heads, length, key_dim), _slice_of_slab(kv_heads, length, value_dim)
    sinks = mx.random.normal((heads,)) if has_sinks else None
    whole = _attend(q, k, v, 0, window, sinks)
    for size in (1, 7, 64, 100):
        ends = [(first, min(length, first + size)) for first in range(0, length, size)]
        parts = [_attend(q[:, a:b], k[:, :b], v[:, :b], a, window, sinks) for a, b in ends]
        assert mx.array_equal(mx.concatenate(parts, axis=1), whole)


@pytest.mark.parametrize("kv_heads", [1, 2])
@pytest.mark.parametrize("share", [*range(1, 10), 17, 40])
def test_single_tokens_of_any_number_of_heads(share: int, kv_heads: int) -> None:
    for start in (0, 15, 63, 64, 200):
        q = _queries(share * kv_heads, 1, 64)
        k, v = (_slice_of_slab(kv_heads, start + 1, 64) for _ in range(2))
        out = np.array(_attend(q, k, v, start))
        assert np.abs(out - _expected(q, k, v, start, None, None)).max() < 1e-5


@pytest.mark.parametrize(("key_dim", "value_dim"), [(64, 64), (40, 24), (24, 40)])
@pytest.mark.parametrize("window", [None, 30])
@pytest.mark.parametrize("has_sinks", [False, True])
def test_tokens_of_two_slabs_get_the_bits_that_they_get_alone(
    key_dim: int, value_dim: int, window: int | None, has_sinks: bool
) -> None:
    """Single tokens and chunks, of slots that are not all in the batch."""
    heads, kv_heads = 6, 2
    slabs = [
        (mx.random.normal((5, kv_heads, n, key_dim)), mx.random.normal((5, kv_heads, n, value_dim)))
        for n in (70, 200)
    ]
    spans = [
        [Span(0, 0, 1, 0), Span(3, 1, 1, 69), Span(1, 5, 20, 33)],
        [Span(4, 2, 1, 150), Span(0, 3, 2, 64), Span(2, 25, 30, 0)],
    ]
    q = mx.random.normal((55, heads, 1, key_dim))
    sinks = mx.random.normal((heads,)) if has_sinks else None
    parts = [Part(*slab, tuple(some)) for slab, some in zip(slabs, spans, strict=True)]
    out = span_attention.attend(q, parts, SCALE, window, sinks)
    assert out.shape == (55, heads, 1, value_dim)
    for (k, v), some in zip(slabs, spans, strict=True):
        for slot, first, num, start in some:
            alone, end = q[first : first + num, :, 0].swapaxes(0, 1), start + num
            ours = out[first : first + num, :, 0].swapaxes(0, 1)
            seen = k[slot, :][:, :end], v[slot, :][:, :end]
            assert mx.array_equal(ours, _attend(alone, *seen, start, window, sinks))
            expected = _expected(alone, *seen, start, window, sinks)
            assert np.abs(np.array(ours) - expected).max() < 1e-5


@pytest.mark.parametrize(("key_dim", "value_dim"), [(64, 64), (40, 24), (24, 40)])
@pytest.mark.parametrize("has_sinks", [False, True])
def test_new_tokens_are_written_before_they_are_seen(
    key_dim: int, value_dim: int, has_sinks: bool
) -> None:
    """Single tokens and chunks of two slabs: as if their K and V had been there, and nothing else
    is touched."""
    heads, kv_heads, num_tokens = 6, 2, 24
    sinks = mx.random.normal((heads,)) if has_sinks else None
    spans = [[Span(0, 0, 1, 69), Span(2, 3, 21, 30)], [Span(1, 1, 2, 0)]]
    q = mx.random.normal((num_tokens, heads, 1, key_dim))
    new = [mx.random.normal((num_tokens, kv_heads, 1, dim)) for dim in (key_dim, value_dim)]
    slabs = [
        [mx.random.normal((3, kv_heads, n, dim)) for dim in (key_dim, value_dim)] for n in (70, 90)
    ]
    there = [[mx.array(np.array(plane)) for plane in slab] for slab in slabs]
    for slab, some in zip(there, spans, strict=True):
        for plane, tokens in zip(slab, new, strict=True):
            for slot, first, num, start in some:
                rows = tokens[first : first + num, :, 0].swapaxes(0, 1)
                plane[slot, :, start : start + num] = rows
    mx.eval(slabs, there)
    expected, out = (
        span_attention.attend(
            q,
            [Part(*slab, tuple(some)) for slab, some in zip(held, spans, strict=True)],
            SCALE,
            None,
            sinks,
            brought,
        )
        for held, brought in ((there, None), (slabs, (new[0], new[1])))
    )
    assert mx.array_equal(out, expected)
    for slab, held in zip(slabs, there, strict=True):
        assert all(map(mx.array_equal, slab, held))


@pytest.mark.parametrize("last", [3, 27, 28, 29, 40, 100, 111])
def test_a_token_looks_back_around_the_end_of_a_ring(last: int) -> None:
    window, ring = 20, 28
    tokens = mx.random.normal((2, 2, last + 1, 64))
    k, v = tokens
    planes = mx.zeros((2, 3, 2, ring, 64))
    for place in range(min(ring, last + 1)):
        age = (last - place) % ring
        planes[:, 1, :, place] = tokens[:, :, last - age]
    q = _queries(4, 1, 64)
    part = Part(planes[0], planes[1], (Span(1, 0, 1, last),))
    out = span_attention.attend(q.swapaxes(0, 1), [part], SCALE, window).swapaxes(0, 1)
    assert np.abs(np.array(out) - _expected(q, k, v, last, window, None)).max() < 1e-5


def test_a_window_larger_than_its_ring_sees_the_ring() -> None:
    k, v = mx.random.normal((2, 1, 2, 28, 64))
    q = _queries(4, 1, 64).swapaxes(0, 1)
    outs = [
        span_attention.attend(q, [Part(k, v, (Span(0, 0, 1, 40),))], SCALE, window)
        for window in (28, 29, 4096)
    ]
    assert mx.array_equal(outs[0], outs[1])
    assert mx.array_equal(outs[0], outs[2])


def test_scores_far_apart_leave_no_trace() -> None:
    """A key that outweighs all others beyond what float32 can say, first, last and in between."""
    for place in (0, 63, 64, 150):
        k, v = mx.zeros((1, 151, 64)), mx.random.normal((1, 151, 64))
        k[:, place] = 1000.0
        out = _attend(mx.ones((1, 1, 64)), k, v, 150, scale=1.0)
        assert mx.array_equal(out[0, 0], v[0, place])


def test_keys_that_nobody_else_holds_live_until_they_are_read() -> None:
    for _ in range(20):
        k, v = mx.random.normal((2, 400, 64)), mx.random.normal((2, 400, 64))
        q = _queries(4, 100, 64)
        expected = _expected(q, k, v, 300, None, None)
        keys = mx.contiguous(k + 0.0)
        out = _attend(q, keys, v, 300)
        del keys
        mx.eval([mx.random.normal((2, 400, 64)) for _ in range(3)], out)
        assert np.abs(np.array(out) - expected).max() < 1e-5


def test_keys_and_values_stay_where_they_lie() -> None:
    k, v = mx.random.normal((4, 2, 4000, 64)), mx.random.normal((4, 2, 4000, 64))
    q = mx.random.normal((3, 4, 1, 64))
    spans = (Span(0, 0, 1, 3000), Span(2, 1, 2, 500))
    mx.eval(k, v, q)
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    mx.eval(span_attention.attend(q, [Part(k, v, spans)], SCALE))
    assert mx.get_peak_memory() - before < 100_000


def test_a_single_key_whose_heads_lie_apart() -> None:
    tokens = mx.random.normal((1, 4, 64))
    for k in (mx.contiguous(tokens.swapaxes(0, 1)), tokens.swapaxes(0, 1)):
        out = _attend(_queries(8, 1, 64), k, k, 0)
        assert mx.allclose(out, mx.repeat(k, 2, axis=0), atol=1e-6)


def test_the_kernel_uses_it_where_all_is_float32() -> None:
    kernel = CpuKernel()
    assert kernel.reads_in_place
    q, k, v = _queries(4, 10, 12), *mx.random.normal((2, 2, 30, 12))
    out = kernel.chunk(q, k, v, SCALE, 20)
    assert mx.array_equal(out, _attend(q, k, v, 20))
    assert not mx.array_equal(out, kernel.plain_chunk(q, k, v, SCALE, 20))
    assert kernel.chunk(q, k, v.astype(mx.bfloat16), SCALE, 20).shape == out.shape
