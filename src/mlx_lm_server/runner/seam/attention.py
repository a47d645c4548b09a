"""Attention over packed tokens: the seam to mlx-lm's models.

A model's layer believes that it holds mlx-lm's KV cache and calls, with T packed tokens,

    queries, keys = rope(queries, offset=cache.offset), rope(keys, offset=cache.offset)
    keys, values = cache.update_and_fetch(keys, values)             # [T, kv_heads, 1, head_dim]
    out = scaled_dot_product_attention(queries, keys, values, cache=cache, scale=…, mask=…)

`LayerCache` writes the new K and V to their slabs and hands them through; the attention function,
which `install` puts in the place of mlx-lm's before a model's module is first imported, sees the
cache and regroups the tokens by slab and by chunk. So one forward serves decode rows and prefill
chunks alike, and nothing is padded. A layer without a cache that attends to another layer's K and
V (Gemma 4) is known by the arrays it was handed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from mlx_lm_server.runner.backends.kernels import AttentionKernel
from mlx_lm_server.runner.backends.x86 import fast_math, native_rows, span_attention
from mlx_lm_server.runner.backends.x86.span_attention import Part, Span
from mlx_lm_server.runner.seam.rectangular import ChunkCache
from mlx_lm_server.runner.seam.step_layout import ChunkSpan, DecodeGroup, StepLayout
from mlx_lm_server.runner.state.kv_storage import KVStorage


class UnknownMask(Exception):
    """A model attends with a mask of its own making, which packed tokens cannot honour."""


# What a model's code raises when it meets a cache, an offset or a mask it was not written for.
SEAM_ERRORS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    NotImplementedError,
    RuntimeError,
    TypeError,
    UnknownMask,
    ValueError,
)


@dataclass(frozen=True, slots=True)
class WindowMask:
    """Stands for a mask that lets a token see the last `window` ones, where K and V are whole."""

    window: int


class LayerCache:
    """What one layer of an mlx-lm model takes for its KV cache. Lives as long as the model; each
    forward begins with `begin` and ends with `end`."""

    def __init__(self, layer: int, storage: KVStorage, kernel: AttentionKernel) -> None:
        self._layer = layer
        self._storage = storage
        self._kernel = kernel
        self._shape = storage.layers[layer]
        self._layout: StepLayout | None = None
        self._handed: tuple[mx.array, mx.array] | None = None
        self._unwritten: tuple[mx.array, mx.array] | None = None  # what attention will write
        self._chunk_kv: list[tuple[mx.array, mx.array]] = []

    def begin(self, layout: StepLayout) -> None:
        self._layout = layout
        self._handed = None

    def end(self) -> None:
        if self._handed is not None:
            _owners.pop(id(self._handed[0]), None)
        self._handed = None
        self._unwritten = None
        self._chunk_kv = []

    @property
    def layout(self) -> StepLayout:
        assert self._layout is not None
        return self._layout

    @property
    def offset(self) -> mx.array:
        """As in mlx-lm, it counts the new tokens once they are written."""
        return self.layout.offsets if self._handed is None else self.layout.ends

    def make_mask(self, *_args: Any, window_size: int | None = None, **_kwargs: Any) -> Any:
        """Masks belong to the groups of tokens; what the model needs to know is the window."""
        if window_size is None or window_size == self._shape.window:
            return None
        return WindowMask(window_size)

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """K and V of the packed tokens, `[T, kv_heads, 1, head_dim]`, go to their slabs, at once or
        as attention begins."""
        self._handed = keys, values
        if self._is_written_in_place:
            self._unwritten = keys, values
        else:
            self._write(keys, values)
        _owners[id(keys)] = self
        return keys, values

    @property
    def _attends_in_place(self) -> bool:
        return self._kernel.reads_in_place and self._shape.is_plain_float32

    @property
    def _is_written_in_place(self) -> bool:
        """By attention, as it begins. Not where another array may share a plane's memory, as a
        checkpoint of a ring does."""
        return self._attends_in_place and self._shape.window is None

    def write_unattended(self) -> None:
        """What was handed on and not attended to. Raises LookupError in a trace, which the places
        of chunks would be a part of."""
        if self._unwritten is None:
            return
        if self.layout.is_sealed:
            raise LookupError(f"layer {self._layer} does not attend to what it keeps")
        self._write(*self._unwritten)
        self._unwritten = None

    def _write(self, keys: mx.array, values: mx.array) -> None:
        self._storage.write_tokens(self._layer, self.layout, keys, values)
        for span in self.layout.chunks:
            chunk = (keys[span.tokens, :, 0].swapaxes(0, 1), values[span.tokens, :, 0])
            self._write_chunk(span, chunk[0], chunk[1].swapaxes(0, 1))

    def keys_and_values(self) -> tuple[mx.array, mx.array]:
        """What the layer wrote in this forward, for layers that share it (Gemma 3n)."""
        assert self._handed is not None
        return self._handed

    def _write_chunk(self, span: ChunkSpan, keys: mx.array, values: mx.array) -> None:
        if self._shape.window is None:
            self._storage.write_chunk(
                self._layer, span.slab_id, span.slot, span.start, keys, values
            )
        else:
            self._chunk_kv.append(
                self._storage.extend_ring(
                    self._layer, span.slab_id, span.slot, span.start, keys, values
                )
            )

    def attend(
        self, queries: mx.array, scale: float, mask: Any = None, sinks: mx.array | None = None
    ) -> mx.array:
        """Queries `[T, heads, 1, dim]` → outputs of the same shape, token by token."""
        if mask is not None and not isinstance(mask, WindowMask):
            raise UnknownMask("it makes its own attention masks")
        window = self._shape.window if mask is None else mask.window
        if self._attends_in_place:
            return self._attend_in_place(queries, scale, window, sinks)
        outputs = [
            self._attend_decodes(group, queries, scale, window, sinks)
            for group in self.layout.decodes
        ]
        outputs += [
            self._attend_chunk(number, span, queries, scale, window, sinks)
            for number, span in enumerate(self.layout.chunks)
        ]
        return outputs[0] if len(outputs) == 1 else mx.concatenate(outputs)

    def _attend_in_place(
        self, queries: mx.array, scale: float, window: int | None, sinks: mx.array | None
    ) -> mx.array:
        """A chunk of a layer with a window sees more than its ring holds: it attends by itself."""
        is_ring = self._shape.window is not None
        apart = self.layout.chunks if is_ring else ()
        end = apart[0].first_token if apart else self.layout.num_tokens
        parts = [
            Part(
                *self._storage.keys_and_values(self._layer, slab_id),
                spans,
                self.layout.tell(slab_id, with_chunks=not is_ring),
            )
            for slab_id, spans in self.layout.spans(with_chunks=not is_ring).items()
        ]
        outputs = []
        if parts:
            first = queries if end == self.layout.num_tokens else queries[:end]
            out = span_attention.attend(first, parts, scale, window, sinks, self._unwritten)
            if self._unwritten is not None:
                out = self._storage.was_written(self._layer, self.layout.slab_ids, by=out)
                self._unwritten = None
            outputs.append(out)
        for (k, v), chunk in zip(self._chunk_kv, apart, strict=True):
            span = Span(0, 0, chunk.num_tokens, k.shape[1] - chunk.num_tokens)
            part = Part(k[None], v[None], (span,))
            outputs.append(
                span_attention.attend(queries[chunk.tokens], [part], scale, window, sinks)
            )
        return outputs[0] if len(outputs) == 1 else mx.concatenate(outputs)

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


# Which layer handed out an array of K, by the array's id, within one forward of the main thread.
_owners: dict[int, LayerCache] = {}


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
        mask: Any,
        sinks: mx.array | None = None,
    ) -> mx.array:
        owner = cache if isinstance(cache, LayerCache) else _owners.get(id(keys))
        if owner is not None:
            return owner.attend(queries, scale, mask, sinks)
        if isinstance(cache, ChunkCache):
            out = cache.attend(queries, keys, values, scale, mask, sinks)
            if out is not None:
                return out
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
        native_rows.install()
