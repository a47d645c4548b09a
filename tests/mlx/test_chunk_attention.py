"""Attention of chunks in C gives what attention is, and the same bits however a prompt is cut."""

from __future__ import annotations

import shutil
import sys

import mlx.core as mx
import numpy as np
import pytest

from mlx_lm_server.runner import chunk_attention, native, native_products
from mlx_lm_server.runner.kernels import CpuKernel

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or not shutil.which("cc") or not {"avx2", "fma"} <= native.cpu_flags(),
    reason="needs a C compiler and a CPU with AVX2",
)

SCALE = 0.125


def _slice_of_slab(kv_heads: int, num_keys: int, dim: int) -> mx.array:
    """As storage gives it: rows one after the other, heads apart; the last slot of its slab."""
    slab = mx.random.normal((2, kv_heads, num_keys + 5, dim))
    return slab[1, :, :num_keys]


def _queries(heads: int, length: int, dim: int) -> mx.array:
    return mx.random.normal((length, heads, dim)).swapaxes(0, 1)


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
    out = chunk_attention.attend(q, k, v, SCALE, start, window, sinks)
    assert np.abs(np.array(out) - _expected(q, k, v, start, window, sinks)).max() < 1e-5


def test_a_prompt_cut_anywhere_gives_the_same_bits() -> None:
    length = 211
    q = _queries(6, length, 64)
    k, v = _slice_of_slab(2, length, 64), _slice_of_slab(2, length, 64)
    whole = chunk_attention.attend(q, k, v, SCALE, 0)
    for size in (1, 7, 64, 100):
        parts = [] if size > 1 else [whole[:, :1]]
        for first in range(len(parts), length, size):
            end = min(length, first + size)
            parts.append(
                chunk_attention.attend(q[:, first:end], k[:, :end], v[:, :end], SCALE, first)
            )
        assert mx.array_equal(mx.concatenate(parts, axis=1), whole)


def test_more_scores_than_mlx_can_count_are_done_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    q = _queries(4, 50, 64)
    k, v = _slice_of_slab(2, 90, 64), _slice_of_slab(2, 90, 64)
    whole = chunk_attention.attend(q, k, v, SCALE, 40)
    monkeypatch.setattr(native_products, "MAX_NUMBERS", 4 * 90 * 13)
    assert mx.array_equal(chunk_attention.attend(q, k, v, SCALE, 40), whole)


def test_scores_far_apart_leave_no_trace() -> None:
    """A key that outweighs all others beyond what float32 can say, first, last and in between."""
    for place in (0, 63, 64, 150):
        k, v = mx.zeros((1, 151, 64)), mx.random.normal((1, 151, 64))
        k[:, place] = 1000.0
        out = chunk_attention.attend(mx.ones((1, 1, 64)), k, v, 1.0, 150)
        assert mx.array_equal(out[0, 0], v[0, place])


def test_keys_that_nobody_else_holds_live_until_they_are_read() -> None:
    for _ in range(20):
        k, v = mx.random.normal((2, 400, 64)), mx.random.normal((2, 400, 64))
        q = _queries(4, 100, 64)
        expected = _expected(q, k, v, 300, None, None)
        keys = mx.contiguous(k + 0.0)
        out = chunk_attention.attend(q, keys, v, SCALE, 300)
        del keys
        mx.eval([mx.random.normal((2, 400, 64)) for _ in range(3)], out)
        assert np.abs(np.array(out) - expected).max() < 1e-5


def test_the_kernel_uses_it_and_does_without_where_its_tiles_do_not_fit() -> None:
    kernel = CpuKernel()
    for dim, is_native in ((64, True), (12, False)):
        q, k, v = (
            _queries(4, 10, dim),
            mx.random.normal((2, 30, dim)),
            mx.random.normal((2, 30, dim)),
        )
        out = kernel.chunk(q, k, v, SCALE, 20)
        assert chunk_attention.can_attend(q, k, v) == is_native
        assert np.abs(np.array(out) - _expected(q, k, v, 20, None, None)).max() < 1e-5
        assert mx.array_equal(out, kernel.plain_chunk(q, k, v, SCALE, 20)) != is_native


def test_a_single_key_whose_heads_lie_apart_is_left_to_plain_operations() -> None:
    kernel = CpuKernel()
    tokens = mx.random.normal((1, 4, 64))
    k = mx.contiguous(tokens.swapaxes(0, 1))
    q = _queries(8, 1, 64)
    assert not chunk_attention.can_attend(q, k, k)
    out = kernel.chunk(q, k, k, SCALE, 0)
    assert mx.allclose(out, mx.repeat(k, 2, axis=0), atol=1e-6)
