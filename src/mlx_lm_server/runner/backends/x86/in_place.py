"""Attention in C that reads K and V where they lie, and puts those of new tokens there itself."""

from __future__ import annotations

from typing import NamedTuple

import mlx.core as mx

from mlx_lm_server.core.plan import RowWork
from mlx_lm_server.runner.backend import AttentionKernel
from mlx_lm_server.runner.backends.x86 import span_attention
from mlx_lm_server.runner.backends.x86.span_attention import Part, Tell, told
from mlx_lm_server.runner.seam.slab_attention import RowAttention, SlabAttention
from mlx_lm_server.runner.state.kv_storage import KVStorage
from mlx_lm_server.runner.state.step_layout import Span, StepLayout


class Told(NamedTuple):
    """Names what attention in C is told of the tokens of a slab; see `span_attention.told`."""

    slab: int  # among the layout's
    with_chunks: bool
    facts: tuple[int, ...]
    width: int

    def of(self, layout: StepLayout) -> mx.array:
        spans = spans_of(layout, self.with_chunks)[layout.slab_ids[self.slab]]
        return told(spans, self.facts, self.width)


def spans_of(layout: StepLayout, with_chunks: bool) -> dict[int, tuple[Span, ...]]:
    """Returns the decode rows of each slab, and its chunks."""

    def find() -> dict[int, tuple[Span, ...]]:
        found: dict[int, tuple[Span, ...]] = {}
        for group in layout.groups if with_chunks else layout.decodes:
            found[group.slab_id] = (*found.get(group.slab_id, ()), *group.spans)
        return found

    return layout.kept(("spans", with_chunks), find)


def _tell(layout: StepLayout, slab_id: int, with_chunks: bool) -> Tell:
    slab = layout.slab_ids.index(slab_id)
    return lambda facts, width: layout.array(Told(slab, with_chunks, facts, width))


class InPlaceAttention(SlabAttention):
    """One layer's attention over packed tokens. A layer with a window is written before, since
    another array may share its planes' memory, as a checkpoint of a ring does; and its chunks,
    which see more than their ring holds, attend by themselves."""

    def __init__(self, storage: KVStorage, layer: int, kernel: AttentionKernel) -> None:
        super().__init__(storage, layer, kernel)
        self._is_ring = self._shape.window is not None
        self._unwritten: tuple[mx.array, mx.array] | None = None

    def put(self, keys: mx.array, values: mx.array) -> None:
        if self._is_ring:
            super().put(keys, values)
        else:
            self._unwritten = keys, values

    def attend(
        self, queries: mx.array, scale: float, window: int | None, sinks: mx.array | None
    ) -> mx.array:
        layout, with_chunks = self.layout, not self._is_ring
        apart = () if with_chunks else layout.chunks
        end = apart[0].first_token if apart else layout.num_tokens
        parts = [
            Part(
                *self._storage.keys_and_values(self._layer, slab_id),
                spans,
                _tell(layout, slab_id, with_chunks),
            )
            for slab_id, spans in spans_of(layout, with_chunks).items()
        ]
        outputs = []
        if parts:
            first = queries if end == layout.num_tokens else queries[:end]
            out = span_attention.attend(first, parts, scale, window, sinks, self._unwritten)
            if self._unwritten is not None:
                out = self._storage.was_written(self._layer, layout.slab_ids, by=out)
                self._unwritten = None
            outputs.append(out)
        for (k, v), chunk in zip(self._chunk_kv, apart, strict=True):
            span = Span(0, 0, chunk.num_tokens, k.shape[1] - chunk.num_tokens)
            part = Part(k[None], v[None], (span,))
            outputs.append(
                span_attention.attend(queries[chunk.tokens], [part], scale, window, sinks)
            )
        return outputs[0] if len(outputs) == 1 else mx.concatenate(outputs)

    def settle(self) -> None:
        if self._unwritten is None:
            return
        if self.layout.is_sealed:
            raise LookupError(f"layer {self._layer} does not attend to what it keeps")
        super().put(*self._unwritten)
        self._unwritten = None

    def end(self) -> None:
        super().end()
        self._unwritten = None


class InPlaceRowAttention(RowAttention):
    """One layer's attention over the chunk of one row, of a layer without a window."""

    def __init__(self, storage: KVStorage, layer: int, kernel: AttentionKernel) -> None:
        super().__init__(storage, layer, kernel)
        self._unwritten: tuple[mx.array, mx.array] | None = None

    def put(self, chunk: RowWork, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Holds K and V until attention writes them. What is put together is computed only if the
        model looks into it."""
        self._unwritten = keys, values
        if not chunk.start:
            return keys, values
        before = self._storage.read_row(self._layer, chunk.slab_id, chunk.slot, chunk.start)
        pairs = zip(before, self._unwritten, strict=True)
        k, v = (mx.concatenate(list(pair), axis=1) for pair in pairs)
        return k, v

    def attend(
        self,
        chunk: RowWork,
        queries: mx.array,
        keys: mx.array,
        values: mx.array,
        scale: float,
        sinks: mx.array | None,
    ) -> mx.array:
        planes = self._storage.keys_and_values(self._layer, chunk.slab_id)
        start = keys.shape[1] - queries.shape[1]
        part = Part(*planes, (Span(chunk.slot, 0, queries.shape[1], start),))
        new = None
        if self._unwritten is not None:
            k, v = self._unwritten
            new = k.swapaxes(0, 1), v.swapaxes(0, 1)
        by_token = queries.swapaxes(0, 1)[:, :, None]
        out = span_attention.attend(by_token, [part], scale, None, sinks, new)
        if new is not None:
            out = self._storage.was_written(self._layer, [chunk.slab_id], by=out)
            self._unwritten = None
        return out[:, :, 0].swapaxes(0, 1)

    def settle(self, chunk: RowWork) -> None:
        if self._unwritten is not None:
            place = (self._layer, chunk.slab_id, chunk.slot)
            self._storage.write_chunk(*place, chunk.start, *self._unwritten)
            self._unwritten = None

    def end(self) -> None:
        self._unwritten = None
