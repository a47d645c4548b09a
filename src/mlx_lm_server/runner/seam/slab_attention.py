"""Attention over K and V that are written to slabs first and then read from there."""

from __future__ import annotations

import mlx.core as mx

from mlx_lm_server.core.plan import RowWork
from mlx_lm_server.runner.backend import AttentionKernel
from mlx_lm_server.runner.state.kv_storage import KVStorage
from mlx_lm_server.runner.state.step_layout import ChunkSpan, DecodeGroup, StepLayout


class SlabAttention:
    """One layer's attention over packed tokens: the decode rows of each slab together, then chunk
    by chunk."""

    def __init__(self, storage: KVStorage, layer: int, kernel: AttentionKernel) -> None:
        self._storage = storage
        self._layer = layer
        self._kernel = kernel
        self._shape = storage.layers[layer]
        self._layout: StepLayout | None = None
        self._chunk_kv: list[tuple[mx.array, mx.array]] = []  # of layers with a window

    def begin(self, layout: StepLayout) -> None:
        self._layout = layout

    @property
    def layout(self) -> StepLayout:
        assert self._layout is not None
        return self._layout

    def put(self, keys: mx.array, values: mx.array) -> None:
        """Writes K and V `[T, kv_heads, 1, dim]`."""
        self._storage.write_tokens(self._layer, self.layout, keys, values)
        for span in self.layout.chunks:
            chunk = (keys[span.tokens, :, 0].swapaxes(0, 1), values[span.tokens, :, 0])
            self._write_chunk(span, chunk[0], chunk[1].swapaxes(0, 1))

    def _write_chunk(self, span: ChunkSpan, keys: mx.array, values: mx.array) -> None:
        place = (self._layer, span.slab_id, span.slot, span.start)
        if self._shape.window is None:
            self._storage.write_chunk(*place, keys, values)
        else:
            self._chunk_kv.append(self._storage.extend_ring(*place, keys, values))

    def attend(
        self, queries: mx.array, scale: float, window: int | None, sinks: mx.array | None
    ) -> mx.array:
        outputs = [
            self._attend_decodes(group, queries, scale, window, sinks)
            for group in self.layout.decodes
        ]
        outputs += [
            self._attend_chunk(number, span, queries, scale, window, sinks)
            for number, span in enumerate(self.layout.chunks)
        ]
        return outputs[0] if len(outputs) == 1 else mx.concatenate(outputs)

    def settle(self) -> None:
        """All is written when it is put."""

    def end(self) -> None:
        self._chunk_kv = []

    def _attend_decodes(
        self,
        group: DecodeGroup,
        queries: mx.array,
        scale: float,
        window: int | None,
        sinks: mx.array | None,
    ) -> mx.array:
        view = self.layout.view_of(group, window, self._shape.ring)
        k, v = self._storage.read_slots(self._layer, group.slab_id, group.num_slots, view.length)
        q = queries[group.tokens]
        if group.queries is not None:
            q = q[group.queries]
        out = self._kernel.decode(q, k, v, scale, view, sinks)
        return out if group.answers is None else out[group.answers]

    def _attend_chunk(
        self,
        number: int,
        span: ChunkSpan,
        queries: mx.array,
        scale: float,
        window: int | None,
        sinks: mx.array | None,
    ) -> mx.array:
        if self._shape.window is None:
            k, v = self._storage.read_row(self._layer, span.slab_id, span.slot, span.end)
        else:
            k, v = self._chunk_kv[number]
        q = queries[span.tokens, :, 0].swapaxes(0, 1)
        start = k.shape[1] - span.num_tokens
        out = self._kernel.chunk(q, k, v, scale, start, window, sinks)
        return out.swapaxes(0, 1)[:, :, None]


class RowAttention:
    """One layer's attention over the chunk of one row."""

    def __init__(self, storage: KVStorage, layer: int, kernel: AttentionKernel) -> None:
        self._storage = storage
        self._layer = layer
        self._kernel = kernel

    def put(self, chunk: RowWork, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Writes K and V `[kv_heads, L, dim]`. Returns those of all tokens that the chunk sees."""
        place = (self._layer, chunk.slab_id, chunk.slot)
        if self._storage.layers[self._layer].window is not None:
            return self._storage.extend_ring(*place, chunk.start, keys, values)
        self._storage.write_chunk(*place, chunk.start, keys, values)
        return self._storage.read_row(*place, chunk.start + keys.shape[1])

    def attend(
        self,
        chunk: RowWork,
        queries: mx.array,
        keys: mx.array,
        values: mx.array,
        scale: float,
        sinks: mx.array | None,
    ) -> mx.array:
        start = keys.shape[1] - queries.shape[1]
        return self._kernel.chunk(queries, keys, values, scale, start, None, sinks)

    def settle(self, chunk: RowWork) -> None:
        """All is written when it is put."""

    def end(self) -> None:
        """Nothing is held."""
