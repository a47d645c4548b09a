"""The arithmetic functions are as exact as float32 lets them be."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_lm_server.runner.backends.x86 import fast_math
from mlx_lm_server.runner.bounded_compile import BoundedCompile


def test_exp_is_right_to_three_in_ten_million() -> None:
    x = np.linspace(-87, 88, 200_001, dtype=np.float32)
    actual = np.array(fast_math.arithmetic_exp(mx.array(x)))
    assert np.abs(actual / np.exp(x.astype(np.float64)) - 1).max() < 3e-7


def test_exp_of_minus_infinity_is_nothing() -> None:
    assert fast_math.arithmetic_exp(mx.array([-mx.inf])).item() < 1e-37


def test_log_is_right_to_three_in_ten_million() -> None:
    x = np.geomspace(1e-8, 1e8, 200_001, dtype=np.float32)
    expected = np.log(x.astype(np.float64))
    actual = np.array(fast_math.arithmetic_log(mx.array(x)))
    assert (np.abs(actual - expected) / np.maximum(1e-3, np.abs(expected))).max() < 3e-7


def test_swiglu_is_mlxs() -> None:
    gate, x = mx.random.normal((300, 96)) * 6, mx.random.normal((300, 96))
    assert mx.allclose(fast_math.swiglu(gate, x), nn.silu(gate) * x, rtol=1e-5, atol=1e-5)


def test_swiglu_of_extreme_gates_stays_finite() -> None:
    gate = mx.array([-1e30, -200.0, 200.0, 1e30])
    assert mx.all(mx.isfinite(fast_math.swiglu(gate, mx.ones(4)))).item()


def test_a_bounded_compile_survives_more_shapes_than_it_keeps() -> None:
    double = BoundedCompile(lambda x: x * 2, max_shapes=3)
    for n in range(1, 10):
        assert double(mx.ones(n)).sum().item() == 2 * n
