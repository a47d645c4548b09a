"""Caches for models that do arithmetic with the K and V they fetch: real, rectangular arrays.

Decode rows of several slabs are put side by side and padded to the longest; a mask hides the rest.

    slab 1  ████████░░      fetched  ████████░░░░░░
            ██████████               ██████████░░░░     mask per row: position ≤ its own
    slab 4  ██████████████           ██████████████
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from mlx_lm_server.core.plan import RowWork
from mlx_lm_server.runner.backend import AttentionKernel, ChunkAttention
from mlx_lm_server.runner.seam.slab_attention import RowAttention
from mlx_lm_server.runner.state.kv_storage import KVStorage
from mlx_lm_server.runner.state.step_layout import DecodeGroup, StepLayout


class _FetchedCache:
    """What models read of a cache beside its methods. They assign `keys` and `values` only to
    order evaluations (DeepSeek V3.2), which needs nothing here."""

    _fetched: tuple[mx.array, mx.array] | None = None

    @property
    def keys(self) -> mx.array | None:
        return self._fetched and self._fetched[0]

    @keys.setter
    def keys(self, _: mx.array) -> None:
        pass

    @property
    def values(self) -> mx.array | None:
        return self._fetched and self._fetched[1]

    @values.setter
    def values(self, _: mx.array) -> None:
        pass

    def keys_and_values(self) -> tuple[mx.array, mx.array]:
        assert self._fetched is not None
        return self._fetched

    def write_unattended(self) -> None:
        """All is written when it is fetched."""

    def end(self) -> None:
        self._fetched = None


class DecodeRowsCache(_FetchedCache):
    """One layer's cache for decode rows `[R, 1]`. `mask_dims` is how many dimensions the scores
    have that the model masks: 4, or 5 where it splits query heads by their KV head (Gemma 2)."""

    def __init__(self, layer: int, storage: KVStorage, mask_dims: int = 4) -> None:
        self._mask_dims = mask_dims
        self._layer = layer
        self._storage = storage
        self._shape = storage.layers[layer]
        self._layout: StepLayout | None = None

    def begin(self, layout: StepLayout) -> None:
        self._layout = layout
        self._fetched = None

    @property
    def layout(self) -> StepLayout:
        assert self._layout is not None
        return self._layout

    @property
    def offset(self) -> mx.array:
        return self.layout.offsets if self._fetched is None else self.layout.ends

    def make_mask(
        self, _n: int = 1, return_array: bool = False, window_size: int | None = None
    ) -> mx.array:
        """`[R, 1, 1, length]` of booleans, with more ones in the middle for more dimensions."""
        length = self._length
        window = window_size or self._shape.window
        parts = []
        for group in self.layout.decodes:
            view = self.layout.view_of(group, window, self._shape.ring)
            visible = view.visible
            if visible is None:
                visible = mx.ones((group.num_slots, 1, 1, view.length), mx.bool_)
            parts.append(_pad(_of_tokens(visible, group), length, axis=3))
        mask = _joined(parts)
        return mask.reshape(mask.shape[0], *[1] * (self._mask_dims - 2), length)

    @property
    def _length(self) -> int:
        return max(self._group_length(group) for group in self.layout.decodes)

    def _group_length(self, group: DecodeGroup) -> int:
        return self._shape.num_places(group.length)

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """`[R, kv_heads, 1, dim]` → `[R, kv_heads, length, dim]`."""
        self._storage.write_tokens(self._layer, self.layout, keys, values)
        parts = [self._fetch(group) for group in self.layout.decodes]
        k, v = (_joined(list(rows)) for rows in zip(*parts, strict=True))
        self._fetched = k, v
        return self._fetched

    def _fetch(self, group: DecodeGroup) -> list[mx.array]:
        """K and V of the group's tokens, as long as the longest row."""
        held = self._storage.read_slots(
            self._layer, group.slab_id, group.num_slots, self._group_length(group)
        )
        return [
            _pad(_of_tokens(self._storage.read(array), group), self._length, axis=2)
            for array in held
        ]


class ChunkCache(_FetchedCache):
    """One layer's cache for one row's chunk `[1, L]`, in the manner of mlx-lm's own caches. K and V
    that the model hands on untouched are attended to by the kernel, if `attends`."""

    def __init__(
        self, layer: int, storage: KVStorage, kernel: AttentionKernel, *, attends: bool = True
    ) -> None:
        self._attends = attends
        self._attention: ChunkAttention = (
            kernel.of_chunks(storage, layer) if attends else RowAttention(storage, layer, kernel)
        )
        self._window = storage.layers[layer].window
        self._chunk: RowWork | None = None
        self.offset = 0

    def begin(self, chunk: RowWork) -> None:
        self._chunk = chunk
        self._fetched = None
        self.offset = chunk.start

    @property
    def chunk(self) -> RowWork:
        assert self._chunk is not None
        return self._chunk

    def make_mask(self, n: int, return_array: bool = False, window_size: int | None = None) -> Any:
        from mlx_lm.models.cache import create_attention_mask

        before = self.chunk.start
        if self._window is not None:
            before = min(before, self._window - 1)
            window_size = window_size or self._window
        if window_size is not None and before + n <= window_size:
            window_size = None
        return create_attention_mask(n, before, return_array, window_size)

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """`[1, kv_heads, L, dim]` → K and V of all tokens that these see."""
        k, v = self._attention.put(self.chunk, keys[0, :], values[0, :])
        self.offset = self.chunk.start + keys.shape[2]
        self._fetched = k[None], v[None]
        return self._fetched

    def write_unattended(self) -> None:
        self._attention.settle(self.chunk)

    def end(self) -> None:
        super().end()
        self._attention.end()

    def attend(
        self,
        queries: mx.array,
        keys: mx.array,
        values: mx.array,
        scale: float,
        mask: Any,
        sinks: mx.array | None,
    ) -> mx.array | None:
        """Queries `[1, heads, L, dim]` → outputs of the same shape; None where K and V are not
        those that were fetched, or the mask is not the usual one."""
        length = queries.shape[2]
        is_usual = (mask is None and length == 1) or (isinstance(mask, str) and mask == "causal")
        if not self._attends or self._fetched is None or not is_usual:
            return None
        k, v = self._fetched
        if keys is not k or values is not v:
            return None
        out = self._attention.attend(self.chunk, queries[0, :], k[0, :], v[0, :], scale, sinks)
        return out[None]


def _of_tokens(by_slot: mx.array, group: DecodeGroup) -> mx.array:
    return by_slot if group.answers is None else by_slot[group.answers]


def _joined(parts: list[mx.array]) -> mx.array:
    return parts[0] if len(parts) == 1 else mx.concatenate(parts)


def _pad(array: mx.array, length: int, axis: int) -> mx.array:
    missing = length - array.shape[axis]
    if missing == 0:
        return array
    widths = [(0, 0)] * array.ndim
    widths[axis] = (0, missing)
    return mx.pad(array, widths)
