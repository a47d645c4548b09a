"""Attention for x86 CPUs in float32."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx

from mlx_lm_server.runner.backend import ChunkAttention, LayerAttention
from mlx_lm_server.runner.backends.fused_kernel import sees
from mlx_lm_server.runner.backends.x86 import (
    code_products,
    fast_math,
    span_attention,
)
from mlx_lm_server.runner.backends.x86.in_place import InPlaceAttention, InPlaceRowAttention
from mlx_lm_server.runner.bounded_compile import BoundedCompile
from mlx_lm_server.runner.seam.slab_attention import RowAttention, SlabAttention
from mlx_lm_server.runner.state.kv_quantisation import PackedKV
from mlx_lm_server.runner.state.kv_storage import KVStorage, LayerShape, Stored
from mlx_lm_server.runner.state.step_layout import SlotsView

# Queries that share one pass over the keys on a CPU, and how many bytes of scores are worked on at
# once, so that they stay in its second-level cache.
CPU_QUERY_BLOCK = 128
CPU_SCORES_BYTES = 2 * 1024 * 1024
# Keys that a row does not see weigh exp(-60), not less: times a scale it must not become a
# denormal number, which x86 multiplies a hundred times as slowly.
LOWEST_EXPONENT = -60.0


class CpuKernel:
    """Attention in plain operations for x86 CPUs, in float32.

    Against MLX's fallback it skips what lies above the causal diagonal and before the window,
    folds the query heads of a KV head into one matrix, divides after the product with V, and has a
    vectorised exp. Where it can be compiled, C code does chunks, and single tokens whose K and V
    are float32 in their slabs (`span_attention`, which the layers' caches call themselves).
    """

    def __init__(self) -> None:
        self._exp_below = BoundedCompile(_exp_below)
        self._products = code_products.choose_products()
        self.reads_in_place = span_attention.is_there() and _are_spans_right(self)

    @property
    def multiplies_codes(self) -> bool:
        return isinstance(self._products, code_products.NativeCodeProducts)

    def is_in_place(self, layers: Sequence[LayerShape]) -> bool:
        return self.reads_in_place and all(layer.is_plain_float32 for layer in layers)

    def of_layer(self, storage: KVStorage, layer: int) -> LayerAttention:
        way = InPlaceAttention if self.is_in_place([storage.layers[layer]]) else SlabAttention
        return way(storage, layer, self)

    def of_chunks(self, storage: KVStorage, layer: int) -> ChunkAttention:
        shape = storage.layers[layer]
        is_whole = self.is_in_place([shape]) and not shape.window
        return (InPlaceRowAttention if is_whole else RowAttention)(storage, layer, self)

    def decode(
        self,
        q: mx.array,
        k: Stored,
        v: Stored,
        scale: float,
        view: SlotsView,
        sinks: mx.array | None = None,
    ) -> mx.array:
        n, heads, _, dim = q.shape
        kv_heads = k.shape[1]
        folded = (q * scale).reshape(n, kv_heads, heads // kv_heads, dim)
        if isinstance(k, PackedKV):
            scores = self._products.scores(folded, k)
        else:
            scores = folded @ k.swapaxes(-1, -2)
        if view.bias is not None:
            scores = scores + view.bias
        if sinks is not None:
            sinks = sinks.reshape(kv_heads, heads // kv_heads, 1)
        out = self._weigh(scores, v, sinks)
        return out.reshape(n, heads, 1, out.shape[-1])

    def chunk(
        self,
        q: mx.array,
        k: mx.array,
        v: mx.array,
        scale: float,
        start: int,
        window: int | None = None,
        sinks: mx.array | None = None,
    ) -> mx.array:
        if self.reads_in_place and span_attention.can_attend(q, k, v):
            return span_attention.attend_chunk(q, k, v, scale, start, window, sinks)
        return self.plain_chunk(q, k, v, scale, start, window, sinks)

    def plain_chunk(
        self,
        q: mx.array,
        k: mx.array,
        v: mx.array,
        scale: float,
        start: int,
        window: int | None = None,
        sinks: mx.array | None = None,
    ) -> mx.array:
        """`chunk` in MLX's own operations."""
        heads, length, dim = q.shape
        kv_heads = k.shape[0]
        grouped = (q * scale).reshape(kv_heads, heads // kv_heads, length, dim)
        if sinks is not None:
            sinks = sinks.reshape(kv_heads, heads // kv_heads, 1)
        blocks = [
            self._query_block(
                grouped[:, :, first : first + CPU_QUERY_BLOCK], k, v, start + first, window, sinks
            )
            for first in range(0, length, CPU_QUERY_BLOCK)
        ]
        out = blocks[0] if len(blocks) == 1 else mx.concatenate(blocks, axis=2)
        return out.reshape(heads, length, v.shape[-1])

    def _query_block(
        self,
        q: mx.array,
        k: mx.array,
        v: mx.array,
        start: int,
        window: int | None,
        sinks: mx.array | None,
    ) -> mx.array:
        """q `[kv_heads, share, block, dim]`, whose first query comes after `start` keys."""
        kv_heads, share, block, _ = q.shape
        first, end = 0 if window is None else max(0, start + 1 - window), start + block
        bias = None
        if block > 1:
            bias = mx.where(sees(start, block, first, end, window), 0.0, -mx.inf)
        at_once = max(1, CPU_SCORES_BYTES // (share * block * (end - first) * q.itemsize))
        parts = []
        for h in range(0, kv_heads, at_once):
            some = slice(h, h + at_once)
            some_sinks = None if sinks is None else sinks[some]
            parts.append(
                self._heads(q[some], k[some, first:end], v[some, first:end], bias, some_sinks)
            )
        return parts[0] if len(parts) == 1 else mx.concatenate(parts)

    def _heads(
        self,
        q: mx.array,
        k: mx.array,
        v: mx.array,
        bias: mx.array | None,
        sinks: mx.array | None,
    ) -> mx.array:
        """Some KV heads of a block: q `[n, share, block, dim]`, k and v `[n, keys, dim]`."""
        n, share, block, dim = q.shape
        scores = q.reshape(n, share * block, dim) @ k.swapaxes(-1, -2)
        if bias is not None:
            scores = (scores.reshape(n, share, block, -1) + bias).reshape(scores.shape)
        if sinks is not None:
            sinks = mx.repeat(sinks, block, axis=1)
        return self._weigh(scores, v, sinks).reshape(n, share, block, v.shape[-1])

    def _weigh(self, scores: mx.array, v: Stored, sinks: mx.array | None) -> mx.array:
        """softmax(scores) @ v, for scores `[…, m, s]`, v `[…, s, dim]`, sinks `[…, m, 1]`."""
        top = scores.max(axis=-1, keepdims=True)
        if sinks is not None:
            top = mx.maximum(top, sinks)
        weights = self._exp_below(scores, top)
        total = weights.sum(axis=-1, keepdims=True)
        if sinks is not None:
            total = total + mx.exp(sinks - top)
        sums = self._products.mixture(weights, v) if isinstance(v, PackedKV) else weights @ v
        return sums / total


def _exp_below(x: mx.array, top: mx.array) -> mx.array:
    return fast_math.arithmetic_exp(mx.maximum(x - top, LOWEST_EXPONENT))


def _are_spans_right(kernel: CpuKernel) -> bool:
    """Whether `span_attention` gives what plain operations give."""
    heads, kv_heads, num_keys, dim = 4, 2, 40, 64
    numbers = mx.sin(mx.arange((heads + 2 * kv_heads) * num_keys * dim)).reshape(-1, num_keys, dim)
    q, k, v = numbers[:heads, :7], numbers[heads : heads + kv_heads], numbers[heads + kv_heads :]
    ours = span_attention.attend_chunk(q, k, v, dim**-0.5, num_keys - 7)
    plain = kernel.plain_chunk(q, k, v, dim**-0.5, num_keys - 7)
    return bool(mx.allclose(ours, plain, rtol=1e-4, atol=1e-5))
