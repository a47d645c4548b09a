"""Blocks that come and go by MLX's operations, where arrays lie in a device's memory: group of
layers by group of layers, so that what is copied at once stays small."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import TypeVar

import mlx.core as mx

from mlx_lm_server.core.block import Place
from mlx_lm_server.core.plan import LoadBlocks, SaveBlocks
from mlx_lm_server.runner.state.block_planes import BlockPlanes, Planes
from mlx_lm_server.runner.state.kv_storage import KVStorage
from mlx_lm_server.runner.state.plane_spans import Span
from mlx_lm_server.runner.state.record_bytes import PlaneGroups, read_array, tensors_of
from mlx_lm_server.tier import Record, Tensor

T = TypeVar("T")

Restored = tuple[Place, tuple[Tensor, ...]]


class BlockOperations:
    """Owned by the block store."""

    def __init__(self, storage: KVStorage, pool: BlockPlanes, groups: PlaneGroups) -> None:
        self._storage = storage
        self._pool = pool
        self._groups = groups
        self._size = pool.block_size

    # ---- from a row to the pool

    def save(self, op: SaveBlocks) -> None:
        first = op.first_block
        for segment_id, run in groupby(op.places, key=lambda place: place.segment_id):
            numbers = [place.number for place in run]
            self._scatter(op, first, segment_id, numbers)
            first += len(numbers)

    def _scatter(self, op: SaveBlocks, first: int, segment_id: int, numbers: Sequence[int]) -> None:
        num_full = min(len(numbers), op.num_tokens // self._size - first)
        segment = self._pool.segment(segment_id)
        for layers in self._storage.layer_groups(self._pool.layers, len(numbers) * self._size):
            written = []
            for layer in layers:
                slots = self._storage.slabs[op.slab_id].planes[layer]
                for source, target in zip(slots, segment[layer], strict=True):
                    self._save_plane(source[op.slot, :], target, numbers, first, num_full, op)
                    written.append(target)
            self._storage.stages.add(written)

    def _save_plane(
        self,
        tokens: mx.array,
        target: mx.array,
        numbers: Sequence[int],
        first: int,
        num_full: int,
        op: SaveBlocks,
    ) -> None:
        """From `[kv_heads, places, width]` to the pool's blocks."""
        start = first * self._size
        end = start + num_full * self._size
        if num_full:
            full = mx.array(list(numbers[:num_full]), mx.int32)
            shape = (tokens.shape[0], num_full, self._size, tokens.shape[2])
            target[full] = tokens[:, start:end].reshape(shape).swapaxes(0, 1)
        if num_full < len(numbers):
            target[numbers[-1], :, : op.num_tokens - end] = tokens[:, end : op.num_tokens]

    # ---- from the pool to a row

    def load(self, op: LoadBlocks) -> None:
        first = op.start // self._size * self._size
        for layers in self._storage.layer_groups(self._pool.layers, op.stop - first):
            written = []
            for layer in layers:
                planes = self._storage.slabs[op.slab_id].planes[layer]
                for number, parts in enumerate(self._pool.gather(layer, op.places)):
                    planes[number] = self._with_blocks(planes[number], parts, op)
                written += planes
            self._storage.stages.add(written)

    def _with_blocks(self, plane: mx.array, parts: Planes, op: LoadBlocks) -> mx.array:
        """The plane of a slab with the blocks written to it, in place. Whole blocks go to a view of
        the plane in blocks, so that they are copied once."""
        start = op.start
        if start % self._size == 0 == plane.shape[2] % self._size:
            first, stop = start // self._size, op.stop // self._size
            num_slots, kv_heads, capacity, width = plane.shape
            shape = (num_slots, kv_heads, capacity // self._size, self._size, width)
            whole, parts = _split(parts, stop - first)
            view = plane.reshape(shape)
            for part in whole:
                view[op.slot, :, first : first + len(part)] = part.swapaxes(0, 1)
                first += len(part)
            plane, start = view.reshape(plane.shape), stop * self._size
        if start < op.stop:
            joined = parts[0] if len(parts) == 1 else mx.concatenate(parts)
            tokens = joined.swapaxes(0, 1).reshape(plane.shape[1], -1, plane.shape[3])
            before = start % self._size
            plane[op.slot, :, start : op.stop] = tokens[:, before : before + op.stop - start]
        return plane

    # ---- from slabs and pool to the tier

    def out(self, planes: Planes, spans: Sequence[Span]) -> list[Tensor]:
        """Gathers the spans on the device, some at a time, before the host looks: it would be given
        the whole of a plane, and on CUDA have it moved."""
        token_bytes = len(planes) * planes[0].nbytes // (planes[0].shape[0] * planes[0].shape[2])
        tensors: list[Tensor] = []
        for _, run in groupby(spans, key=lambda span: span.num_tokens):
            alike = list(run)
            for some in self._batches(alike, token_bytes * alike[0].num_tokens):
                tensors += _gathered(planes, some)
        return tensors

    # ---- from the tier to the pool

    def restore(self, places: Sequence[Place], records: Sequence[Record]) -> None:
        items = zip(places, (record.tensors for record in records), strict=True)
        for segment_id, run in groupby(items, key=lambda item: item[0].segment_id):
            # A block with fewer tokens than the others is put in place by itself.
            for num_tokens, alike in groupby(run, key=lambda item: item[1][0].shape[2]):
                for some in self._batches(list(alike), self._pool.token_bytes * num_tokens):
                    self._put(segment_id, num_tokens, some)

    def _batches(self, items: Sequence[T], item_bytes: int) -> Iterator[Sequence[T]]:
        """Yields as many at once as may be copied together."""
        at_once = max(1, self._storage.max_copied_bytes // max(1, item_bytes))
        for first in range(0, len(items), at_once):
            yield items[first : first + at_once]

    def _put(self, segment_id: int, num_tokens: int, items: Sequence[Restored]) -> None:
        segment, written = self._pool.segment(segment_id), []
        numbers = mx.array([place.number for place, _ in items], mx.int32)
        for position, group in enumerate(self._groups):
            blocks = mx.stack([read_array(tensors[position]) for _, tensors in items])
            for column, (layer, number) in enumerate(group):
                plane = segment[layer][number]
                if num_tokens == self._size:
                    plane[numbers] = blocks[:, column]
                else:
                    plane[numbers, :, :num_tokens] = blocks[:, column]
                written.append(plane)
        self._storage.stages.add(written)


def _gathered(planes: Planes, spans: Sequence[Span]) -> list[Tensor]:
    """Spans of one length, each `[planes, kv_heads, num_tokens, width]`."""
    of_planes = [_spans_of(plane, spans)[:, None] for plane in planes]
    whole = mx.contiguous(mx.concatenate(of_planes, axis=1))
    mx.eval(whole)
    return tensors_of(whole)


def _spans_of(plane: mx.array, spans: Sequence[Span]) -> mx.array:
    """`[spans, kv_heads, num_tokens, width]`: a gather of slots that are not much more than what is
    taken, slices of others, since a gather copies whole slots."""
    num_tokens = spans[0].num_tokens
    if plane.shape[2] < 2 * num_tokens and all(span.start == 0 for span in spans):
        return plane[mx.array([span.slot for span in spans], mx.int32), :, :num_tokens]
    return mx.stack([plane[s.slot, :, s.start : s.start + num_tokens] for s in spans])


def _split(parts: Sequence[mx.array], count: int) -> tuple[Planes, Planes]:
    """The first `count` blocks of all parts, and the others."""
    before: Planes = []
    after: Planes = []
    for part in parts:
        taken = min(count, len(part))
        count -= taken
        if taken:
            before.append(part[:taken])
        if taken < len(part):
            after.append(part[taken:])
    return before, after
