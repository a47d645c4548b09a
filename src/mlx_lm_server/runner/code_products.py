"""Products with quantised K and V that never make the numbers themselves, for CPUs in float32.

With x = code · scale + bias for each group g of a key's numbers (V alike),

    query · key          = Σ_g scale_g · (query_g · codes_g) + bias_g · Σ query_g
    Σ_t weight_t · v_tg  = Σ_t (weight_t · scale_tg) · codes_tg + Σ_t weight_t · bias_tg

so that only the codes are as many as the numbers. Where a head has several groups, each query
becomes one row per group, zero outside it; then one product with all codes does for all groups.
"""

from __future__ import annotations

import mlx.core as mx

from mlx_lm_server.runner.kv_quantisation import PackedKV


def scores(q: mx.array, k: PackedKV) -> mx.array:
    """q `[n, kv_heads, m, dim]`, k of `[n, kv_heads, length, dim]` → `[n, kv_heads, m, length]`."""
    scales, biases = k.scales.swapaxes(-1, -2), k.biases.swapaxes(-1, -2)
    groups = q.reshape(*q.shape[:-1], k.num_groups, -1)  # [n, kv_heads, m, groups, group_size]
    sums = groups.sum(axis=-1)
    if k.num_groups == 1:
        return _with_codes(q, k) * scales + sums * biases
    rows = groups[..., None, :] * mx.eye(k.num_groups)[..., None]
    products = _with_codes(rows.reshape(*q.shape[:2], -1, q.shape[-1]), k)
    by_group = products.reshape(*groups.shape[:-1], -1)  # [n, kv_heads, m, groups, length]
    return (by_group * scales[:, :, None]).sum(axis=-2) + sums @ biases


def mixture(weights: mx.array, v: PackedKV) -> mx.array:
    """weights `[n, kv_heads, m, length]` @ v of `[n, kv_heads, length, dim]`."""
    scales = v.scales.swapaxes(-1, -2)
    if v.num_groups == 1:
        return _of_codes(weights * scales, v) + weights @ v.biases
    n, kv_heads, m, length = weights.shape
    scaled = weights[..., None, :] * scales[:, :, None]  # [n, kv_heads, m, groups, length]
    products = _of_codes(scaled.reshape(n, kv_heads, -1, length), v)
    squares = products.reshape(n, kv_heads, m, v.num_groups, v.num_groups, -1)
    own = (squares * mx.eye(v.num_groups)[..., None]).sum(axis=-2)
    return (own + (weights @ v.biases)[..., None]).reshape(n, kv_heads, m, -1)


def _with_codes(x: mx.array, packed: PackedKV) -> mx.array:
    """`x @ codes.T`"""
    return x @ packed.codes_as(x.dtype).swapaxes(-1, -2)


def _of_codes(x: mx.array, packed: PackedKV) -> mx.array:
    """`x @ codes`"""
    return x @ packed.codes_as(x.dtype)
