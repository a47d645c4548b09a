"""Blocks that come and go as bytes, where arrays lie in the host's memory: each is copied once,
from where it lies to where it stays."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import mlx.core as mx

from mlx_lm_server.core.block import Place
from mlx_lm_server.core.plan import LoadBlocks, SaveBlocks
from mlx_lm_server.runner.state.block_planes import BlockPlanes, Planes
from mlx_lm_server.runner.state.kv_storage import KVStorage
from mlx_lm_server.runner.state.plane_spans import Span
from mlx_lm_server.runner.state.record_bytes import PlaneGroups, copy_spans
from mlx_lm_server.runner.state.stages import unchanged
from mlx_lm_server.tier import Record, Tensor


class BlockBytes:
    """Owned by the block store."""

    def __init__(self, storage: KVStorage, pool: BlockPlanes, groups: PlaneGroups) -> None:
        self._storage = storage
        self._pool = pool
        self._groups = groups

    def save(self, op: SaveBlocks) -> None:
        spots = enumerate(op.places, op.first_block)
        for segment_id, run in groupby(spots, key=lambda spot: spot[1].segment_id):
            spans = []
            for index, place in run:
                in_row = self._in_row(op.slot, index, 0, op.num_tokens)
                spans.append((in_row, Span(place.number, 0, in_row.num_tokens)))
            slab, segment = self._planes_of(op.slab_id, segment_id)
            self._storage.copy_bytes(list(zip(slab, segment, strict=True)), spans)

    def load(self, op: LoadBlocks) -> None:
        size = self._pool.block_size
        if len(op.places) != -(-op.stop // size) - op.start // size:
            raise ValueError(f"{len(op.places)} blocks for tokens {op.start} to {op.stop}")
        spots = enumerate(op.places, op.start // size)
        for segment_id, run in groupby(spots, key=lambda spot: spot[1].segment_id):
            spans = []
            for index, place in run:
                in_row = self._in_row(op.slot, index, op.start, op.stop)
                start = in_row.start - index * size
                spans.append((Span(place.number, start, in_row.num_tokens), in_row))
            slab, segment = self._planes_of(op.slab_id, segment_id)
            self._storage.copy_bytes(list(zip(segment, slab, strict=True)), spans)

    def restore(self, places: Sequence[Place], records: Sequence[Record]) -> None:
        """Straight from the records to where the blocks lie."""
        items = zip(places, (record.tensors for record in records), strict=True)
        for segment_id, run in groupby(items, key=lambda item: item[0].segment_id):
            segment, restored = self._pool.segment(segment_id), list(run)
            for position, group in enumerate(self._groups):
                tensors = [tensors[position] for _, tensors in restored]
                spans = [
                    Span(place.number, 0, tensor.shape[2])
                    for (place, _), tensor in zip(restored, tensors, strict=True)
                ]
                planes = [unchanged(segment[layer][number]) for layer, number in group]
                self._restore_group(planes, spans, [tensor.data for tensor in tensors])

    def out(self, planes: Planes, spans: Sequence[Span]) -> list[Tensor]:
        return copy_spans(self._storage.copies, planes, spans)

    def _restore_group(
        self, planes: Planes, spans: Sequence[Span], copies: Sequence[bytes | memoryview]
    ) -> None:
        def write() -> None:
            mx.eval(planes)
            self._storage.copies.into(planes, spans, copies)

        self._storage.stages.add_copy(write, sum(map(len, copies)))

    def _in_row(self, slot: int, index: int, start: int, stop: int) -> Span:
        """Of the row's block with that index the tokens from `start` to `stop - 1`."""
        size = self._pool.block_size
        first = max(start, index * size)
        return Span(slot, first, min(stop, (index + 1) * size) - first)

    def _planes_of(self, slab_id: int, segment_id: int) -> tuple[Planes, Planes]:
        """Of all layers in blocks, those of a slab and those of a segment, in one order."""
        slab, segment = self._storage.slabs[slab_id].planes, self._pool.segment(segment_id)
        layers = self._pool.layers
        return (
            [plane for layer in layers for plane in slab[layer]],
            [plane for layer in layers for plane in segment[layer]],
        )
