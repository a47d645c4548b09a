"""RMS norm, rotary embedding and SwiGLU in C give what MLX's own operations give."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx_lm.models import activations

from mlx_lm_server.runner.backends.x86.native_rows import NativeRows
from tests.back_ends import needs_native

pytestmark = needs_native


@pytest.fixture(scope="module")
def plain() -> tuple[Any, Any]:
    """MLX's own, whose place the module's have taken when the tests began."""
    installed = mx.fast.rms_norm.__self__
    assert isinstance(installed, NativeRows)
    return installed._plain_norm, installed._plain_rope


@pytest.mark.parametrize("shape", [(5, 512), (3, 1, 512), (7, 8, 1, 64), (2, 3, 100), (1, 1)])
def test_norms_are_the_same(shape: tuple[int, ...], plain: tuple[Any, Any]) -> None:
    x, weight = 3 * mx.random.normal(shape), mx.random.normal(shape[-1:])
    assert mx.allclose(mx.fast.rms_norm(x, weight, 1e-6), plain[0](x, weight, 1e-6), atol=1e-5)


def test_rows_that_lie_otherwise_are_normed_too(plain: tuple[Any, Any]) -> None:
    block, weight = mx.random.normal((64, 6, 10)), mx.random.normal((64,))
    for x in (
        block.swapaxes(0, 2)[:, 1:5],
        block[:, :, 0].T,
        block[:, 0, 0][None],
        block[:, :1, 0].swapaxes(0, 1),
        block[None, :, :, 0].swapaxes(1, 2),
    ):
        expected = plain[0](x, weight, 1e-6)
        assert mx.allclose(mx.fast.rms_norm(x, weight, 1e-6), expected, atol=1e-5)
    apart = mx.random.normal((128,))[::2]
    x = mx.random.normal((3, 64))
    assert mx.allclose(mx.fast.rms_norm(x, apart, 1e-6), plain[0](x, apart, 1e-6), atol=1e-5)


@pytest.mark.parametrize("is_by_base", [True, False])
@pytest.mark.parametrize(
    ("num_tokens", "heads", "dim", "dims"),
    [(1, 1, 64, 64), (7, 8, 64, 64), (5, 4, 64, 32), (300, 2, 128, 128), (3, 1, 100, 6)],
)
def test_rotations_are_the_same(
    num_tokens: int, heads: int, dim: int, dims: int, is_by_base: bool, plain: tuple[Any, Any]
) -> None:
    x, offset = mx.random.normal((num_tokens, heads, 1, dim)), 37 * mx.arange(num_tokens)
    how: dict[str, Any] = {"traditional": False, "offset": offset, "base": 1e6, "scale": 1.0}
    if not is_by_base:
        how |= {"base": None, "scale": 0.5, "freqs": mx.arange(1.0, dims // 2 + 1)}
    expected = plain[1](x, dims, **how)
    assert mx.allclose(mx.fast.rope(x, dims, **how), expected, atol=1e-4)
    kept = mx.fast.rope(x, dims, **how)  # with what the first call has kept
    assert mx.allclose(kept, expected, atol=1e-4)


@pytest.mark.parametrize("shape", [(1, 1, 96), (7, 1, 100), (300, 256), (2, 3, 1, 37), (1, 1)])
def test_swiglu_is_the_same(shape: tuple[int, ...]) -> None:
    gate, x = 6 * mx.random.normal(shape), mx.random.normal(shape)
    assert mx.allclose(activations.swiglu(gate, x), nn.silu(gate) * x, rtol=1e-5, atol=1e-6)


def test_swiglu_of_a_token_does_not_depend_on_those_beside_it() -> None:
    both = mx.random.normal((300, 2, 202))  # gate and x side by side, as Phi 3 makes them
    together = activations.swiglu(both[:, 0], both[:, 1])
    for rows in (slice(0, 1), slice(7, 30), slice(299, 300)):
        alone = activations.swiglu(both[rows, 0], both[rows, 1])
        assert mx.array_equal(together[rows], alone)


def test_swiglu_of_extreme_gates() -> None:
    gate = mx.array([-1e30, -200.0, 0.0, 200.0, 1e30, mx.inf, mx.nan])
    expected = mx.array([0.0, 0.0, 0.0, 200.0, 1e30, mx.inf, mx.nan])
    assert mx.allclose(activations.swiglu(gate, mx.ones(7)), expected, equal_nan=True)


def test_what_it_does_not_know_is_left_to_mlx(plain: tuple[Any, Any]) -> None:
    x = mx.random.normal((2, 4, 3, 64))
    how: dict[str, Any] = {"base": 1e4, "scale": 1.0}
    for odd in ({"traditional": True, "offset": 3}, {"traditional": False, "offset": 5}):
        assert mx.array_equal(mx.fast.rope(x, 64, **how, **odd), plain[1](x, 64, **how, **odd))
    half, weight = x.astype(mx.bfloat16), mx.ones((64,), mx.bfloat16)
    assert mx.array_equal(mx.fast.rms_norm(half, weight, 1e-5), plain[0](half, weight, 1e-5))
    assert mx.array_equal(mx.fast.rms_norm(x, None, 1e-5), plain[0](x, None, 1e-5))
    assert activations.swiglu(half, half).dtype == mx.bfloat16
    assert activations.swiglu(x, x[:1]).shape == x.shape
