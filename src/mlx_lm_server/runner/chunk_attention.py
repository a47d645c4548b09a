"""Attention of a chunk of new tokens in C, for x86 CPUs in float32: `native/products/attention.c`.

MLX offers no way to add an operation of one's own from Python, so it travels as products do
(docs/adr/0005): as `mx.addmm` with an `alpha` that no product has. The matrix on the left is a view
with the shape of the scores, which exist nowhere, over what the code in C is to know: where the
keys lie, some numbers, the queries. The address of the keys is a product of that kind too.
"""

from __future__ import annotations

import struct

import mlx.core as mx

ADDRESS_ALPHA = 2.0**-112
ATTENTION_ALPHA = 2.0**-116
DIM_MULTIPLE = 8
# MLX counts the numbers of a batch of matrices with 31 bits.
MAX_SCORES = 2**31 - 1


def is_native() -> bool:
    """Whether our library stands in front of the BLAS: the address of a matrix is not the zeros
    that the product would be."""
    return bool(mx.any(_addresses(mx.ones((1, 1, DIM_MULTIPLE))).view(mx.int32) != 0))


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
    """`AttentionKernel.chunk`, where `can_attend`. Each head's rows of k must lie one after the
    other, or MLX would hand on the address of a copy that is gone when it is read."""
    heads, length, _ = q.shape
    num_scores = heads * k.shape[1]
    at_once = max(1, MAX_SCORES // num_scores)
    if length <= at_once:
        return _attend_at_once(q, k, v, scale, start, window, sinks)
    parts = []
    for first in range(0, length, at_once):
        some, end = q[:, first : first + at_once], start + min(length, first + at_once)
        keys, values = k[:, :end], v[:, :end]
        parts.append(_attend_at_once(some, keys, values, scale, start + first, window, sinks))
    return mx.concatenate(parts, axis=1)


def _attend_at_once(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    scale: float,
    start: int,
    window: int | None,
    sinks: mx.array | None,
) -> mx.array:
    heads, length, key_dim = q.shape
    kv_heads, num_keys, value_dim = v.shape
    share = heads // kv_heads
    facts = (length, share, start, window or 0, key_dim, sinks is not None, _bits(scale), 0)
    parts = [_addresses(k), mx.broadcast_to(_posing_as_floats(facts), (kv_heads, len(facts)))]
    if sinks is not None:
        parts.append(sinks.astype(mx.float32).reshape(kv_heads, share))
    packed = mx.concatenate([*parts, q.reshape(kv_heads, -1)], axis=1)
    rows = share * length
    posing = mx.as_strided(packed, (kv_heads, rows, num_keys), (packed.shape[1], num_keys, 1))
    out = mx.addmm(mx.array(0.0), posing, v, alpha=ATTENTION_ALPHA, beta=0.0)
    (out,) = mx.depends([out], [k])  # whose address alone would not keep it
    by_head: mx.array = out.reshape(heads, length, value_dim)
    return by_head


def _addresses(k: mx.array) -> mx.array:
    """Where each head of k `[kv_heads, …]` begins: `[kv_heads, 2]`, 8 bytes that pose as floats."""
    kv_heads, _, dim = k.shape
    nothing = mx.broadcast_to(mx.array(0.0), (kv_heads, dim, 2))
    found = mx.addmm(mx.array(0.0), k[:, :1], nothing, alpha=ADDRESS_ALPHA, beta=0.0)
    return found.reshape(kv_heads, 2)


def _posing_as_floats(numbers: tuple[int, ...]) -> mx.array:
    return mx.array(numbers, mx.int32).view(mx.float32)


def _bits(x: float) -> int:
    (bits,) = struct.unpack("<i", struct.pack("<f", x))
    return int(bits)
