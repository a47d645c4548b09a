"""Attention in MLX's own operations."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import mlx.core as mx

from mlx_lm_server.runner.backend import ChunkAttention, LayerAttention
from mlx_lm_server.runner.seam.slab_attention import RowAttention, SlabAttention
from mlx_lm_server.runner.state.kv_quantisation import PackedKV
from mlx_lm_server.runner.state.kv_storage import KVStorage, LayerShape, Stored
from mlx_lm_server.runner.state.step_layout import SlotsView

# Of chunks over layers with a window, each about as large as chunk times window.
MAX_MASKS = 4


class FusedKernel:
    """MLX's own fused attention: Metal, CUDA, and CPUs with a fast exp. With `multiplies_codes`
    quantised K and V are multiplied as they are; where `mx.quantized_matmul` takes longer than
    reading them, they are read."""

    def __init__(self, read: Callable[[Stored], mx.array], *, multiplies_codes: bool) -> None:
        self._read = read
        self.multiplies_codes = multiplies_codes
        self._masks: dict[tuple[int, int, int], mx.array] = {}

    def is_in_place(self, layers: Sequence[LayerShape]) -> bool:
        return False

    def of_layer(self, storage: KVStorage, layer: int) -> LayerAttention:
        return SlabAttention(storage, layer, self)

    def of_chunks(self, storage: KVStorage, layer: int) -> ChunkAttention:
        return RowAttention(storage, layer, self)

    def decode(
        self,
        q: mx.array,
        k: Stored,
        v: Stored,
        scale: float,
        view: SlotsView,
        sinks: mx.array | None = None,
    ) -> mx.array:
        if self.multiplies_codes and isinstance(k, PackedKV) and isinstance(v, PackedKV):
            return decode_packed(q, k, v, scale, view, sinks)
        return mx.fast.scaled_dot_product_attention(
            q, self._read(k), self._read(v), scale=scale, mask=view.mask(q.shape[1]), sinks=sinks
        )

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
        length = q.shape[1]
        mask: str | mx.array = "causal"
        if window is not None and start + length > window:
            mask = self._window_mask(start, length, window)
        out = mx.fast.scaled_dot_product_attention(
            q[None], k[None], v[None], scale=scale, mask=mask, sinks=sinks
        )
        return out.squeeze(0)  # an index would copy

    def _window_mask(self, start: int, length: int, window: int) -> mx.array:
        """Returns what a chunk sees that comes after `start` keys: one array for all layers, and
        for the chunks of other steps that are as long."""
        key = (start, length, window)
        if key not in self._masks:
            if len(self._masks) == MAX_MASKS:
                self._masks.pop(next(iter(self._masks)))
            self._masks[key] = sees(start, length, 0, start + length, window)
        return self._masks[key]


def decode_packed(
    q: mx.array, k: PackedKV, v: PackedKV, scale: float, view: SlotsView, sinks: mx.array | None
) -> mx.array:
    """`AttentionKernel.decode` with `mx.quantized_matmul`."""
    n, heads, _, dim = q.shape
    kv_heads = k.shape[1]
    folded = (q * scale).reshape(n, kv_heads, heads // kv_heads, dim)
    scores = _quantised_product(folded, k, transpose=True)
    if (bias := view.bias_of(scores)) is not None:
        scores = scores + bias
    if sinks is None:
        weights = mx.softmax(scores, axis=-1, precise=True)
    else:
        sinks = mx.broadcast_to(sinks.reshape(kv_heads, -1, 1), (*scores.shape[:-1], 1))
        both = mx.concatenate([sinks.astype(scores.dtype), scores], axis=-1)
        weights = mx.softmax(both, axis=-1, precise=True)[..., 1:]
    out = _quantised_product(weights, v, transpose=False)
    return out.reshape(n, heads, 1, out.shape[-1])


def _quantised_product(x: mx.array, packed: PackedKV, transpose: bool) -> mx.array:
    return mx.quantized_matmul(
        x,
        packed.codes,
        packed.scales,
        packed.biases,
        transpose=transpose,
        group_size=packed.quantisation.group_size,
        bits=packed.quantisation.bits,
    )


def sees(start: int, length: int, first: int, end: int, window: int | None) -> mx.array:
    """`[length, end - first]`: whether query `start + i` sees key `first + j`."""
    ages = mx.arange(start, start + length)[:, None] - mx.arange(first, end)[None]
    return ages >= 0 if window is None else (ages >= 0) & (ages < window)
