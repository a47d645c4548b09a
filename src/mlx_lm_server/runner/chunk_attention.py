"""Attention of a chunk of new tokens in C, for x86 CPUs in float32: `native/products/attention.c`.

It travels as a product (native_products.py, docs/adr/0008): the matrix on the left is a view with
the shape of the scores, which exist nowhere, over what the code in C is to know: where the keys
lie, some numbers, the queries. The matrix on the right are the values.
"""

from __future__ import annotations

import mlx.core as mx

from mlx_lm_server.runner import native_products

DIM_MULTIPLE = 8


def can_attend(q: mx.array, k: mx.array, v: mx.array) -> bool:
    """Whether the tiles of the code in C fit. A single key does not: it counts as contiguous
    whatever its strides say, and by them a product would be given a copy of it."""
    dims = k.shape[-1], v.shape[-1]
    is_float32 = q.dtype == k.dtype == v.dtype == mx.float32
    return is_float32 and k.shape[1] > 1 and all(dim % DIM_MULTIPLE == 0 for dim in dims)


def attend(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    scale: float,
    start: int,
    window: int | None = None,
    sinks: mx.array | None = None,
) -> mx.array:
    """`AttentionKernel.chunk`, where `can_attend`; as many queries at once as MLX counts scores."""
    heads, length, key_dim = q.shape
    kv_heads, num_keys, value_dim = v.shape
    share = heads // kv_heads
    addresses, bits = native_products.addresses_of(k), native_products.bits_of(scale)
    logits = [] if sinks is None else [sinks.astype(mx.float32).reshape(kv_heads, share)]
    at_once = max(1, native_products.MAX_NUMBERS // (heads * num_keys))
    parts = []
    for first in range(0, length, at_once):
        some = q[:, first : first + at_once]
        num = some.shape[1]
        facts = (num, share, start + first, window or 0, key_dim, len(logits), bits, 0)
        head = native_products.posing_as_floats(facts)
        told = [addresses, mx.broadcast_to(head, (kv_heads, len(facts))), *logits]
        packed = mx.concatenate([*told, some.reshape(kv_heads, -1)], axis=1)
        scores = (kv_heads, share * num, num_keys)
        posing = mx.as_strided(packed, scores, (packed.shape[1], num_keys, 1))
        out = native_products.run(posing, v, native_products.ATTENTION_ALPHA)
        parts.append(out.reshape(heads, num, value_dim))
    parts = mx.depends(parts, [k])  # whose address alone would not keep it
    return parts[0] if len(parts) == 1 else mx.concatenate(parts, axis=1)
