"""RMS norm, rotary embedding and SwiGLU in C, each in one operation, for x86 CPUs in float32.

MLX's CPU back end makes them of seven, fifteen and four operations. For the few rows of a decode
step an operation costs more to hand over than to compute: two threads, an allocation, a wake-up.
They travel as products (native_products.py, docs/adr/0008): the matrix on the right is a view with
the shape of a square one, over the cosines and sines of a rotation or over nothing. The weights of
a norm and the gates of SwiGLU come as what is added to the product.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import mlx.core as mx

from mlx_lm_server.runner.backend import ModelOperations
from mlx_lm_server.runner.backends.x86 import native_products
from mlx_lm_server.runner.backends.x86.native_products import (
    EPSILON_SHIFT,
    MAX_NUMBERS,
    RMS_NORM_ALPHA,
    ROTATION_ALPHA,
    SWIGLU_ALPHA,
)


class NativeRows:
    """Stands in for `mx.fast.rms_norm`, `mx.fast.rope` and mlx-lm's `swiglu`; hands on what it does
    not know."""

    def __init__(self, plain_swiglu: Callable[..., mx.array]) -> None:
        self._plain_norm: Callable[..., mx.array] = mx.fast.rms_norm
        self._plain_rope: Callable[..., mx.array] = mx.fast.rope
        self._plain_swiglu = plain_swiglu
        self._nothing: dict[int, mx.array] = {}
        self._turns: dict[tuple[float, int], mx.array] = {}
        # Of the forward at hand: tables by the identity of what they are made of, which they keep.
        self._offset: mx.array | None = None
        self._tables: dict[tuple[object, ...], tuple[mx.array | None, mx.array]] = {}

    def rms_norm(self, x: mx.array, weight: mx.array | None, eps: float, **stream: Any) -> mx.array:
        """`mx.fast.rms_norm`, over the last axis."""
        is_ours = weight is not None and x.dtype == weight.dtype == mx.float32 and x.size > 0
        if weight is None or not is_ours or stream or weight.shape != x.shape[-1:]:
            return self._plain_norm(x, weight, eps, **stream)
        rows, nothing = x.reshape(-1, x.shape[-1]), self._square(x.shape[-1])
        return native_products.run(rows, nothing, _alpha_with(eps), weight).reshape(x.shape)

    def swiglu(self, gate: mx.array, x: mx.array) -> mx.array:
        """SiLU(gate) · x, of one shape."""
        dim = x.shape[-1]
        is_ours = gate.dtype == x.dtype == mx.float32 and gate.shape == x.shape and x.size > 0
        if not is_ours or dim * dim > MAX_NUMBERS:
            return self._plain_swiglu(gate, x)
        rows, gates = x.reshape(-1, dim), gate.reshape(-1, dim)
        return native_products.run(rows, self._square(dim), SWIGLU_ALPHA, gates).reshape(x.shape)

    def _square(self, dim: int) -> mx.array:
        """Nothing, posing as `[dim, dim]`."""
        if dim not in self._nothing:
            self._nothing[dim] = mx.as_strided(mx.array([0.0]), (dim, dim), (dim, 1))
            mx.eval(self._nothing[dim])
        return self._nothing[dim]

    def rope(
        self,
        a: mx.array,
        dims: int,
        *,
        traditional: bool,
        base: float | None,
        scale: float,
        offset: int | mx.array,
        freqs: mx.array | None = None,
        **stream: Any,
    ) -> mx.array:
        """`mx.fast.rope` of packed tokens `[T, heads, 1, dim]`, each with an offset of its own."""
        is_packed = a.ndim == 4 and a.shape[2] == 1 and a.dtype == mx.float32 and a.size > 0
        is_odd = traditional or dims % 2 or stream or a.shape[0] * a.shape[-1] ** 2 > MAX_NUMBERS
        if (
            not isinstance(offset, mx.array)
            or offset.shape != a.shape[:1]
            or not is_packed
            or is_odd
        ):
            return self._plain_rope(
                a,
                dims,
                traditional=traditional,
                base=base,
                scale=scale,
                offset=offset,
                freqs=freqs,
                **stream,
            )
        num_tokens, heads, _, dim = a.shape
        table = self._table(offset, dims, dim, base, scale, freqs)
        rows = a.reshape(num_tokens, heads, dim)
        return native_products.run(rows, table, ROTATION_ALPHA).reshape(a.shape)

    def _table(
        self,
        offset: mx.array,
        dims: int,
        dim: int,
        base: float | None,
        scale: float,
        freqs: mx.array | None,
    ) -> mx.array:
        """For each token what `rotate` calls `packed`, posing as `[T, dim, dim]`."""
        if self._offset is not offset:
            self._offset, self._tables = offset, {}
        key = dims, dim, base, scale, id(freqs)
        if key not in self._tables:
            turns = mx.reciprocal(freqs) if freqs is not None else self._turns_of(base, dims // 2)
            places = offset.astype(mx.float32)[:, None]
            angles = mx.matmul(places if scale == 1.0 else places * scale, turns[None])
            count = mx.full((offset.size, 1), float(dims))
            packed = mx.concatenate([count, mx.cos(angles), mx.sin(angles)], axis=1)
            posing = mx.as_strided(packed, (offset.size, dim, dim), (dims + 1, dim, 1))
            self._tables[key] = freqs, posing
        return self._tables[key][1]

    def _turns_of(self, base: float | None, half: int) -> mx.array:
        """By how much each pair turns from place to place."""
        assert base is not None
        if (base, half) not in self._turns:
            turns = mx.exp(mx.arange(half) * (-math.log(base) / half))
            mx.eval(turns)
            self._turns[base, half] = turns
        return self._turns[base, half]


def _alpha_with(eps: float) -> float:
    """Epsilon travels in the fraction of `alpha`, to 15 bits of its own."""
    return RMS_NORM_ALPHA * (1 + (native_products.bits_of(eps) >> EPSILON_SHIFT) / 2**23)


def operations(plain_swiglu: Callable[..., mx.array]) -> ModelOperations:
    """Returns ours, or none where the library in C is not there or does not give the same.
    `plain_swiglu` does what they do not know."""
    ours = NativeRows(plain_swiglu)
    if not (native_products.is_there() and _is_right(ours)):
        return ModelOperations(swiglu=plain_swiglu)
    return ModelOperations(rms_norm=ours.rms_norm, rope=ours.rope, swiglu=ours.swiglu)


def _is_right(ours: NativeRows) -> bool:
    x, weight = mx.sin(mx.arange(40.0)).reshape(5, 8), mx.cos(mx.arange(8.0))
    offset = mx.array([0, 3, 7, 100, 2000])
    how: dict[str, Any] = {"traditional": False, "base": 1e4, "scale": 1.0, "offset": offset}
    rows = x.reshape(5, 1, 1, 8)
    pairs = (
        (ours.rms_norm(x, weight, 1e-5), mx.fast.rms_norm(x, weight, 1e-5)),
        (ours.rope(rows, 6, **how), mx.fast.rope(rows, 6, **how)),
        (ours.swiglu(9 * x, x), 9 * x * mx.sigmoid(9 * x) * x),
    )
    return all(bool(mx.allclose(a, b, atol=1e-4)) for a, b in pairs)
