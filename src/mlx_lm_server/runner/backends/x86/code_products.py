"""Products with quantised K and V that never make the numbers themselves, for CPUs in float32.

With x = code · scale + bias for each group g of a key's numbers (V alike),

    query · key          = Σ_g scale_g · (query_g · codes_g) + bias_g · Σ query_g
    Σ_t weight_t · v_tg  = Σ_t (weight_t · scale_tg) · codes_tg + Σ_t weight_t · bias_tg

so that only the codes are as many as the numbers. Where a head has several groups, each query
becomes one row per group, zero outside it; then one product with all codes does for all groups.

MLX must turn codes into floats to multiply them, in memory. `native/products`, where it stands
in front of the BLAS, does it in registers (docs/adr/0005).
"""

from __future__ import annotations

import mlx.core as mx

from mlx_lm_server.runner.backends.x86 import native_products
from mlx_lm_server.runner.state.kv_quantisation import PackedKV, Quantisation

# By the bits of a code, how the library is told that the matrix on the right consists of them.
ALPHAS = {8: native_products.BYTES_ALPHA, 4: native_products.NIBBLES_ALPHA}


class CodeProducts:
    """Attention's two products, in MLX's own operations."""

    def scores(self, q: mx.array, k: PackedKV) -> mx.array:
        """q `[n, kv_heads, m, dim]`, k of `[n, kv_heads, length, dim]` → `[n, kv_heads, m,
        length]`."""
        scales, biases = k.scales.swapaxes(-1, -2), k.biases.swapaxes(-1, -2)
        groups = q.reshape(*q.shape[:-1], k.num_groups, -1)  # [n, kv_heads, m, groups, group_size]
        sums = groups.sum(axis=-1)
        if k.num_groups == 1:
            return self.with_codes(q, k) * scales + sums * biases
        rows = groups[..., None, :] * mx.eye(k.num_groups)[..., None]
        products = self.with_codes(rows.reshape(*q.shape[:2], -1, q.shape[-1]), k)
        by_group = products.reshape(*groups.shape[:-1], -1)  # [n, kv_heads, m, groups, length]
        return (by_group * scales[:, :, None]).sum(axis=-2) + sums @ biases

    def mixture(self, weights: mx.array, v: PackedKV) -> mx.array:
        """weights `[n, kv_heads, m, length]` @ v of `[n, kv_heads, length, dim]`."""
        scales = v.scales.swapaxes(-1, -2)
        if v.num_groups == 1:
            return self.of_codes(weights * scales, v) + weights @ v.biases
        n, kv_heads, m, length = weights.shape
        scaled = weights[..., None, :] * scales[:, :, None]  # [n, kv_heads, m, groups, length]
        products = self.of_codes(scaled.reshape(n, kv_heads, -1, length), v)
        squares = products.reshape(n, kv_heads, m, v.num_groups, v.num_groups, -1)
        own = (squares * mx.eye(v.num_groups)[..., None]).sum(axis=-2)
        return (own + (weights @ v.biases)[..., None]).reshape(n, kv_heads, m, -1)

    def with_codes(self, x: mx.array, packed: PackedKV) -> mx.array:
        """`x @ codes.T`"""
        return x @ packed.codes_as(x.dtype).swapaxes(-1, -2)

    def of_codes(self, x: mx.array, packed: PackedKV) -> mx.array:
        """`x @ codes`"""
        return x @ packed.codes_as(x.dtype)


class NativeCodeProducts(CodeProducts):
    """The same by small_gemm, which knows by `alpha` that it is given codes."""

    def with_codes(self, x: mx.array, packed: PackedKV) -> mx.array:
        return self._product(x, _posing_as_floats(packed).swapaxes(-1, -2), packed)

    def of_codes(self, x: mx.array, packed: PackedKV) -> mx.array:
        return self._product(x, _posing_as_floats(packed), packed)

    def _product(self, x: mx.array, codes: mx.array, packed: PackedKV) -> mx.array:
        return native_products.run(x, codes, ALPHAS[packed.quantisation.bits])


def _posing_as_floats(packed: PackedKV) -> mx.array:
    """An array with the shape of the numbers, float32 by name, whose every head begins where the
    head's codes do: only small_gemm may read it, anything else would read past its end."""
    plane = packed.plane
    assert plane is not None
    num_slots, kv_heads, length, width = packed.shape
    head = plane.shape[2] * plane.shape[3]
    strides = (kv_heads * head, head, width, 1)
    return mx.as_strided(plane.view(mx.float32), (num_slots, kv_heads, length, width), strides)


def choose_products() -> CodeProducts:
    """The native ones where they give the same, which is tried in memory with room to spare."""
    native, plain = NativeCodeProducts(), CodeProducts()
    is_same = all(_are_same(native, plain, _example(bits)) for bits in ALPHAS)
    return native if is_same else plain


def _example(bits: int) -> PackedKV:
    """Of a slab so large that also a product that takes its codes for floats stays inside."""
    num_slots, length, width = 2, 61, 64
    numbers = mx.sin(mx.arange(16 * num_slots * 2 * 64 * width)).reshape(-1, 2, 64, width)
    quantisation = Quantisation(bits, width)
    planes = quantisation.pack(numbers)
    codes, scales, biases = (plane[:num_slots, :, :length] for plane in planes)
    return PackedKV(codes, scales, biases, quantisation, planes[0])


def _are_same(one: CodeProducts, other: CodeProducts, packed: PackedKV) -> bool:
    num_slots, kv_heads, length, width = packed.shape
    x = mx.ones((num_slots, kv_heads, 5, width)) * mx.cos(mx.arange(width))
    weights = mx.ones((num_slots, kv_heads, 5, length)) * mx.cos(mx.arange(length))
    pairs = (
        (one.with_codes(x, packed), other.with_codes(x, packed)),
        (one.of_codes(weights, packed), other.of_codes(weights, packed)),
    )
    return all(bool(mx.allclose(a, b, rtol=1e-4, atol=1e-2)) for a, b in pairs)
