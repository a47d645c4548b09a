"""Attention over packed tokens: the seam to mlx-lm's models.

A model's layer believes that it holds mlx-lm's KV cache and calls, with T packed tokens,

    queries, keys = rope(queries, offset=cache.offset), rope(keys, offset=cache.offset)
    keys, values = cache.update_and_fetch(keys, values)             # [T, kv_heads, 1, head_dim]
    out = scaled_dot_product_attention(queries, keys, values, cache=cache, scale=…, mask=…)

`LayerCache` writes the new K and V to their slabs and hands them through; the attention function,
which `install` puts in the place of mlx-lm's before a model's module is first imported, sees the
cache and regroups the tokens by slab and by chunk. So one forward serves decode rows and prefill
chunks alike, and nothing is padded.
"""

from __future__ import annotations

from typing import Any, Protocol

import mlx.core as mx

from mlx_lm_server.runner import fast_math
from mlx_lm_server.runner.kv_storage import KVStorage
from mlx_lm_server.runner.step_layout import ChunkSpan, DecodeGroup, StepLayout

# Queries that share one pass over the keys on a CPU, and how many bytes of scores are worked on at
# once, so that they stay in its second-level cache.
CPU_QUERY_BLOCK = 128
CPU_SCORES_BYTES = 2 * 1024 * 1024


class AttentionKernel(Protocol):
    """The two shapes of attention. Q is `[…, heads, …]`, K and V `[…, kv_heads, …]`."""

    def decode(
        self, q: mx.array, k: mx.array, v: mx.array, scale: float, group: DecodeGroup
    ) -> mx.array:
        """q `[n, heads, 1, dim]`, k and v `[n, kv_heads, length, dim]` → `[n, heads, 1, dim]`."""

    def chunk(self, q: mx.array, k: mx.array, v: mx.array, scale: float, start: int) -> mx.array:
        """q `[heads, L, dim]` at positions `start …`; k and v `[kv_heads, start + L, dim]`
        → `[heads, L, dim]`."""


class FusedKernel:
    """MLX's own fused attention: Metal, CUDA, and CPUs with a fast exp."""

    def decode(
        self, q: mx.array, k: mx.array, v: mx.array, scale: float, group: DecodeGroup
    ) -> mx.array:
        return mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask=group.visible)

    def chunk(self, q: mx.array, k: mx.array, v: mx.array, scale: float, start: int) -> mx.array:
        return mx.fast.scaled_dot_product_attention(
            q[None], k[None], v[None], scale=scale, mask="causal"
        )[0]


class CpuKernel:
    """Attention in plain operations for x86 CPUs, in float32.

    Against MLX's fallback it skips what lies above the causal diagonal, folds the query heads of
    a KV head into one matrix, divides after the product with V, and has a vectorised exp.
    """

    def __init__(self) -> None:
        self._exp_below = fast_math.BoundedCompile(lambda x, top: fast_math.arithmetic_exp(x - top))

    def decode(
        self, q: mx.array, k: mx.array, v: mx.array, scale: float, group: DecodeGroup
    ) -> mx.array:
        n, heads, _, dim = q.shape
        kv_heads = k.shape[1]
        folded = (q * scale).reshape(n, kv_heads, heads // kv_heads, dim)
        scores = folded @ k.swapaxes(-1, -2)
        if group.bias is not None:
            scores = scores + group.bias
        return self._weigh(scores, v).reshape(n, heads, 1, v.shape[-1])

    def chunk(self, q: mx.array, k: mx.array, v: mx.array, scale: float, start: int) -> mx.array:
        heads, length, dim = q.shape
        kv_heads = k.shape[0]
        grouped = (q * scale).reshape(kv_heads, heads // kv_heads, length, dim)
        blocks = [
            self._query_block(grouped[:, :, first : first + CPU_QUERY_BLOCK], k, v, start + first)
            for first in range(0, length, CPU_QUERY_BLOCK)
        ]
        out = blocks[0] if len(blocks) == 1 else mx.concatenate(blocks, axis=2)
        return out.reshape(heads, length, v.shape[-1])

    def _query_block(self, q: mx.array, k: mx.array, v: mx.array, start: int) -> mx.array:
        """q `[kv_heads, share, block, dim]`, whose first query stands at position `start`."""
        kv_heads, share, block, _ = q.shape
        end = start + block
        bias = _causal_bias(start, block) if block > 1 else None
        at_once = max(1, CPU_SCORES_BYTES // (share * block * end * q.itemsize))
        parts = [
            self._heads(
                q[h : h + at_once], k[h : h + at_once, :end], v[h : h + at_once, :end], bias
            )
            for h in range(0, kv_heads, at_once)
        ]
        return parts[0] if len(parts) == 1 else mx.concatenate(parts)

    def _heads(self, q: mx.array, k: mx.array, v: mx.array, bias: mx.array | None) -> mx.array:
        """Some KV heads of a block: q `[n, share, block, dim]`, k and v `[n, end, dim]`."""
        n, share, block, dim = q.shape
        scores = q.reshape(n, share * block, dim) @ k.swapaxes(-1, -2)
        if bias is not None:
            scores = (scores.reshape(n, share, block, -1) + bias).reshape(scores.shape)
        return self._weigh(scores, v).reshape(n, share, block, v.shape[-1])

    def _weigh(self, scores: mx.array, v: mx.array) -> mx.array:
        """softmax(scores) @ v, for scores `[…, m, s]` and v `[…, s, dim]`."""
        weights = self._exp_below(scores, scores.max(axis=-1, keepdims=True))
        return (weights @ v) / weights.sum(axis=-1, keepdims=True)


def _causal_bias(start: int, block: int) -> mx.array:
    """`[block, start + block]`: 0 where a query may look, -inf above the diagonal."""
    queries = mx.arange(start, start + block)[:, None]
    return mx.where(queries >= mx.arange(start + block)[None], 0.0, -mx.inf)


class LayerCache:
    """What one layer of an mlx-lm model takes for its KV cache. Lives as long as the model; each
    forward begins with `begin`."""

    def __init__(self, layer: int, storage: KVStorage, kernel: AttentionKernel) -> None:
        self._layer = layer
        self._storage = storage
        self._kernel = kernel
        self._layout: StepLayout | None = None

    def begin(self, layout: StepLayout) -> None:
        self._layout = layout

    @property
    def layout(self) -> StepLayout:
        assert self._layout is not None
        return self._layout

    @property
    def offset(self) -> mx.array:
        return self.layout.offsets

    def make_mask(self, *_args: Any, **_kwargs: Any) -> None:
        """Masks belong to the groups of tokens, so the model needs none."""

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Write K and V of the packed tokens, `[T, kv_heads, 1, head_dim]`, to their slabs."""
        for group in self.layout.decodes:
            self._write_decodes(group, keys, values)
        for span in self.layout.chunks:
            self._write_chunk(span, keys, values)
        return keys, values

    def _write_decodes(self, group: DecodeGroup, keys: mx.array, values: mx.array) -> None:
        slab = self._storage.slabs[group.slab_id]
        tokens = slice(group.first_token, group.first_token + group.num_tokens)
        slab.keys[self._layer][group.slots, :, group.positions] = keys[tokens, :, 0]
        slab.values[self._layer][group.slots, :, group.positions] = values[tokens, :, 0]

    def _write_chunk(self, span: ChunkSpan, keys: mx.array, values: mx.array) -> None:
        slab = self._storage.slabs[span.slab_id]
        tokens = slice(span.first_token, span.first_token + span.num_tokens)
        place = slice(span.start, span.start + span.num_tokens)
        slab.keys[self._layer][span.slot, :, place] = keys[tokens, :, 0].swapaxes(0, 1)
        slab.values[self._layer][span.slot, :, place] = values[tokens, :, 0].swapaxes(0, 1)

    def attend(self, queries: mx.array, scale: float) -> mx.array:
        """Queries `[T, heads, 1, dim]` → outputs of the same shape, token by token."""
        outputs = [self._attend_decodes(group, queries, scale) for group in self.layout.decodes]
        outputs += [self._attend_chunk(span, queries, scale) for span in self.layout.chunks]
        return outputs[0] if len(outputs) == 1 else mx.concatenate(outputs)

    def _attend_decodes(self, group: DecodeGroup, queries: mx.array, scale: float) -> mx.array:
        slab = self._storage.slabs[group.slab_id]
        k = slab.keys[self._layer][: group.num_slots, :, : group.length]
        v = slab.values[self._layer][: group.num_slots, :, : group.length]
        q = queries[group.first_token : group.first_token + group.num_tokens]
        if group.queries is not None:
            q = q[group.queries]
        out = self._kernel.decode(q, k, v, scale, group)
        return out if group.answers is None else out[group.answers]

    def _attend_chunk(self, span: ChunkSpan, queries: mx.array, scale: float) -> mx.array:
        slab = self._storage.slabs[span.slab_id]
        end = span.start + span.num_tokens
        k = slab.keys[self._layer][span.slot, :, :end]
        v = slab.values[self._layer][span.slot, :, :end]
        q = queries[span.first_token : span.first_token + span.num_tokens, :, 0].swapaxes(0, 1)
        out = self._kernel.chunk(q, k, v, scale, span.start)
        return out.swapaxes(0, 1)[:, :, None]


def choose_kernel(dtype: mx.Dtype) -> AttentionKernel:
    if fast_math.is_slow_cpu() and dtype == mx.float32:
        return CpuKernel()
    return FusedKernel()


def install(use_arithmetic_swiglu: bool) -> None:
    """Put our attention, and on slow CPUs our SwiGLU, where mlx-lm's models import theirs from.

    Must run before a model's module is first imported: models bind these names at import.
    """
    from mlx_lm.models import activations, base

    original = base.scaled_dot_product_attention
    if getattr(original, "is_packed", False):
        return

    def scaled_dot_product_attention(
        queries: mx.array,
        keys: mx.array,
        values: mx.array,
        cache: Any,
        scale: float,
        mask: mx.array | None,
        sinks: mx.array | None = None,
    ) -> mx.array:
        if isinstance(cache, LayerCache):
            return cache.attend(queries, scale)
        plain: mx.array = original(queries, keys, values, cache, scale, mask, sinks)
        return plain

    scaled_dot_product_attention.is_packed = True  # type: ignore[attr-defined]
    base.scaled_dot_product_attention = scaled_dot_product_attention
    if use_arithmetic_swiglu:
        plain_swiglu = activations.swiglu

        def swiglu(gate: mx.array, x: mx.array) -> mx.array:
            is_float32 = gate.dtype == mx.float32
            return fast_math.swiglu(gate, x) if is_float32 else plain_swiglu(gate, x)

        activations.swiglu = swiglu
