"""The bytes of the prefix cache: blocks of tokens in a pool, and checkpoints of other state.

    segment 2, layer 0   plane 0  keys    [num_blocks, kv_heads, block_size, key_dim]
                         plane 1  values  [num_blocks, kv_heads, block_size, value_dim]

Only layers that keep every token lie in blocks. A checkpoint has the rest of a row after so many
tokens: the rings of layers with a window as they lie in the slab, and recurrent state.

What the core ordered is done literally and in order. In the host's memory bytes are copied to where
they stay; elsewhere operations do it, group of layers by group of layers, so that what is copied at
once stays small.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import cast

import mlx.core as mx

from mlx_lm_server.core.block import Place
from mlx_lm_server.core.plan import (
    CopyTokens,
    CreateSegment,
    DropSegment,
    DropState,
    LoadBlocks,
    LoadOp,
    LoadState,
    MoveBlocks,
    OffloadBlocks,
    OffloadState,
    OffloadTokens,
    RestoreBlocks,
    RestoreState,
    SaveBlocks,
    SaveOp,
    SaveState,
)
from mlx_lm_server.core.tier import Label, Payload
from mlx_lm_server.runner import native_products
from mlx_lm_server.runner.kv_storage import KVStorage
from mlx_lm_server.runner.plane_spans import Span, copy_between
from mlx_lm_server.runner.record_bytes import (
    ArraySpec,
    RecordShapes,
    copy_spans,
    read_array,
    stacked_bytes,
    write_spans,
)
from mlx_lm_server.runner.row_states import RowStates
from mlx_lm_server.tier import Kind, Record, Tensor

Planes = list[mx.array]
Restored = tuple[Place, tuple[Tensor, ...]]


@dataclass(slots=True)
class _KeptState:
    rings: list[Planes]
    recurrent: list[list[mx.array | None]]

    @property
    def arrays(self) -> Planes:
        rings = [plane for planes in self.rings for plane in planes]
        return rings + [a for part in self.recurrent for a in part if a is not None]


class BlockStore:
    """Owned by the model runner, used on the engine's main thread only."""

    def __init__(self, storage: KVStorage, states: RowStates | None, block_size: int) -> None:
        self._storage = storage
        self._row_states = states
        self._size = block_size
        numbers = range(len(storage.layers))
        self._full = [n for n in numbers if storage.layers[n].ring is None]
        self._token_bytes = sum(storage.layers[n].bytes_per_token for n in self._full)
        self._windows = [n for n in numbers if storage.layers[n].ring is not None]
        self._segments: dict[int, list[Planes]] = {}
        self._states: dict[int, _KeptState] = {}
        self.shapes = RecordShapes(storage.layers, states.parts if states else (), block_size)
        self.offload: Callable[[Record], object] = _nowhere
        self._is_in_host_memory = is_in_host_memory()

    @property
    def nbytes(self) -> int:
        """What the arrays hold now, in bytes."""
        segments = self._segments.values()
        blocks = sum(plane.nbytes for layers in segments for planes in layers for plane in planes)
        return blocks + sum(a.nbytes for state in self._states.values() for a in state.arrays)

    # ---- what rows leave behind

    def save(self, op: SaveOp) -> None:
        match op:
            case CreateSegment():
                self._segments[op.segment_id] = self._new_segment(op.num_blocks)
            case DropSegment():
                del self._segments[op.segment_id]
            case MoveBlocks():
                self._move_blocks(op)
            case SaveBlocks():
                self._save_blocks(op)
            case SaveState():
                self._save_state(op)
            case DropState():
                del self._states[op.state_id]
            case OffloadBlocks():
                self._offload_blocks(op)
            case OffloadTokens():
                self._offload_tokens(op)
            case OffloadState():
                self._offload_state(op)
            case RestoreBlocks():
                self._restore_blocks(op)
            case RestoreState():
                self._restore_state(op)

    def _new_segment(self, num_blocks: int) -> list[Planes]:
        """Blocks are read as far as they were written."""
        layers = [self._storage.layers[n] for n in self._full]
        shapes = [[(p.shape(num_blocks, self._size), p.dtype) for p in x.planes] for x in layers]
        return [[native_products.unwritten(*each) for each in layer] for layer in shapes]

    def _move_blocks(self, op: MoveBlocks) -> None:
        by_target = groupby(op.moves, key=lambda move: move[1].segment_id)
        for segment_id, group in by_target:
            moves = list(group)
            sources = [source for source, _ in moves]
            numbers = mx.array([target.number for _, target in moves], mx.int32)
            for layers in self._storage.layer_groups(self._full, len(moves) * self._size):
                written = []
                for layer in layers:
                    planes = self._segments[segment_id][self._full.index(layer)]
                    for plane, parts in zip(planes, self._gather(layer, sources), strict=True):
                        plane[numbers] = _joined(parts)
                        written.append(plane)
                self._storage.stages.add(written)

    def _gather(self, layer: int, places: Sequence[Place]) -> Iterator[list[mx.array]]:
        """Per plane the blocks in their order, each part `[n, kv_heads, block_size, width]`."""
        runs = [
            (segment_id, [place.number for place in run])
            for segment_id, run in groupby(places, key=lambda place: place.segment_id)
        ]
        for number in range(len(self._storage.layers[layer].planes)):
            yield [
                _take(self._segments[segment_id][self._full.index(layer)][number], numbers)
                for segment_id, numbers in runs
            ]

    def _save_blocks(self, op: SaveBlocks) -> None:
        """The last block may be filled in part."""
        save = self._copy_blocks if self._is_in_host_memory else self._scatter_blocks
        first = op.first_block
        for segment_id, run in groupby(op.places, key=lambda place: place.segment_id):
            numbers = [place.number for place in run]
            save(op, first, segment_id, numbers)
            first += len(numbers)

    def _copy_blocks(
        self, op: SaveBlocks, first: int, segment_id: int, numbers: Sequence[int]
    ) -> None:
        """Bytes, from where the row lies to where the blocks stay."""
        spans = []
        for index, number in enumerate(numbers, first):
            start = index * self._size
            num_tokens = min(self._size, op.num_tokens - start)
            spans.append((Span(op.slot, start, num_tokens), Span(number, 0, num_tokens)))
        slots, segment = self._storage.slabs[op.slab_id].planes, self._segments[segment_id]
        pool = dict(zip(self._full, segment, strict=True))
        groups = [
            (
                [_unchanged(slots[layer][number]) for layer, number in group],
                [_unchanged(pool[layer][number]) for layer, number in group],
            )
            for group in self.shapes.plane_groups
        ]

        def copy() -> None:
            mx.eval(groups)
            for sources, targets in groups:
                copy_between(sources, targets, spans)

        num_tokens = sum(span.num_tokens for span, _ in spans)
        self._storage.stages.add_copy(copy, num_tokens * self._token_bytes)

    def _scatter_blocks(
        self, op: SaveBlocks, first: int, segment_id: int, numbers: Sequence[int]
    ) -> None:
        """By operations."""
        num_full = min(len(numbers), op.num_tokens // self._size - first)
        for layers in self._storage.layer_groups(self._full, len(numbers) * self._size):
            written = []
            for layer in layers:
                slots = self._storage.slabs[op.slab_id].planes[layer]
                pool = self._segments[segment_id][self._full.index(layer)]
                for source, target in zip(slots, pool, strict=True):
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

    def _save_state(self, op: SaveState) -> None:
        rings = []
        for layer in self._windows:
            planes = self._storage.slabs[op.slab_id].planes[layer]
            held = min(op.num_tokens, planes[0].shape[2])
            rings.append([mx.contiguous(plane[op.slot, :, :held]) for plane in planes])
        recurrent = self._row_states.read(op.row) if self._row_states else []
        state = self._states[op.state_id] = _KeptState(rings, recurrent)
        self._storage.stages.add(state.arrays)

    # ---- what the tier is given and gives back

    def _offload_blocks(self, op: OffloadBlocks) -> None:
        labelled = zip(op.places, op.labels, strict=True)
        for segment_id, run in groupby(labelled, key=lambda item: item[0].segment_id):
            blocks = list(run)
            spans = [Span(place.number, 0, len(label.token_ids)) for place, label in blocks]
            labels = [label for _, label in blocks]
            planes = dict(zip(self._full, self._segments[segment_id], strict=True))
            self._offload(planes, spans, labels)

    def _offload_tokens(self, op: OffloadTokens) -> None:
        spots = zip(op.slots, op.numbers, strict=True)
        spans = [Span(slot, number * self._size, self._size) for slot, number in spots]
        planes = {layer: self._storage.slabs[op.slab_id].planes[layer] for layer in self._full}
        self._offload(planes, spans, op.labels)

    def _offload(
        self, planes: Mapping[int, Planes], spans: Sequence[Span], labels: Sequence[Label]
    ) -> None:
        """Copies of spans, by layer, of the planes as they are now: made between what is written
        before and after, when nothing runs."""
        groups = [
            [_unchanged(planes[layer][number]) for layer, number in group]
            for group in self.shapes.plane_groups
        ]

        def give() -> None:
            mx.eval(groups)
            tensors = [copy_spans(group, spans) for group in groups]
            for number, label in enumerate(labels):
                self._give(label, [copies[number] for copies in tensors])

        num_tokens = sum(span.num_tokens for span in spans)
        self._storage.stages.add_copy(give, num_tokens * self._token_bytes)

    def _offload_state(self, op: OffloadState) -> None:
        kept = self._states[op.state_id]
        arrays = [plane for planes in kept.rings for plane in planes]
        arrays += [array for part in kept.recurrent for array in part if array is not None]
        specs = self.shapes.of_state(op.label.num_tokens)
        if [ArraySpec.of(array) for array in arrays] != specs:
            return  # a state that this model does not usually have

        def give() -> None:
            groups = self.shapes.grouped(specs)
            tensors = [stacked_bytes([arrays[n] for n in group]) for group in groups]
            self._give(op.label, tensors)

        self._storage.stages.add(arrays, give)

    def _give(self, label: Label, tensors: Sequence[Tensor]) -> None:
        kind: Kind = "state" if label.is_state else "block"
        ids, num_tokens = label.token_ids, label.num_tokens
        self.offload(Record(label.name, kind, label.parent, ids, num_tokens, tuple(tensors)))

    def _restore_blocks(self, op: RestoreBlocks) -> None:
        restored = zip(op.places, map(_tensors_of, op.payloads), strict=True)
        for segment_id, run in groupby(restored, key=lambda item: item[0].segment_id):
            items, segment = list(run), self._segments[segment_id]
            if self._is_in_host_memory:
                self._put(segment, items)
            else:
                self._scatter(segment, items)

    def _put(self, segment: Sequence[Planes], items: Sequence[Restored]) -> None:
        """Straight from the records to where the blocks lie."""
        groups = [
            [_unchanged(segment[self._full.index(layer)][number]) for layer, number in group]
            for group in self.shapes.plane_groups
        ]

        def put() -> None:
            mx.eval(groups)
            for position, planes in enumerate(groups):
                tensors = [tensors[position] for _, tensors in items]
                spans = [
                    Span(place.number, 0, tensor.shape[2])
                    for (place, _), tensor in zip(items, tensors, strict=True)
                ]
                write_spans(planes, spans, tensors)

        num_bytes = sum(tensor.nbytes for _, tensors in items for tensor in tensors)
        self._storage.stages.add_copy(put, num_bytes)

    def _scatter(self, segment: Sequence[Planes], items: Sequence[Restored]) -> None:
        """By operations. A block with fewer tokens than the others is put in place by itself."""
        for num_tokens, run in groupby(items, key=lambda item: item[1][0].shape[2]):
            group_items, written = list(run), []
            numbers = mx.array([place.number for place, _ in group_items], mx.int32)
            for position, group in enumerate(self.shapes.plane_groups):
                blocks = mx.stack([read_array(tensors[position]) for _, tensors in group_items])
                for column, (layer, number) in enumerate(group):
                    plane = segment[self._full.index(layer)][number]
                    if num_tokens == self._size:
                        plane[numbers] = blocks[:, column]
                    else:
                        plane[numbers, :, :num_tokens] = blocks[:, column]
                    written.append(plane)
            self._storage.stages.add(written)

    def _restore_state(self, op: RestoreState) -> None:
        specs = self.shapes.of_state(op.num_tokens)
        arrays: dict[int, mx.array] = {}
        tensors = _tensors_of(op.payload)
        for tensor, group in zip(tensors, self.shapes.grouped(specs), strict=True):
            arrays.update(zip(group, read_array(tensor), strict=True))
        flat = iter([mx.contiguous(arrays[number]) for number in range(len(specs))])
        rings = [[next(flat) for _ in self._storage.layers[n].planes] for n in self._windows]
        parts = self._row_states.parts if self._row_states else ()
        recurrent = [[None if a is None else next(flat) for a in part.arrays] for part in parts]
        state = self._states[op.state_id] = _KeptState(rings, recurrent)
        self._storage.stages.add(state.arrays)

    # ---- what rows need not compute

    def load(self, op: LoadOp) -> None:
        match op:
            case LoadBlocks():
                self._load_blocks(op)
            case CopyTokens():
                self._storage.copy_tokens(op, self._full)
            case LoadState():
                self._load_state(op)

    def _load_blocks(self, op: LoadBlocks) -> None:
        first = op.start // self._size * self._size
        for layers in self._storage.layer_groups(self._full, op.stop - first):
            written = []
            for layer in layers:
                planes = self._storage.slabs[op.slab_id].planes[layer]
                for number, parts in enumerate(self._gather(layer, op.places)):
                    planes[number] = self._with_blocks(planes[number], parts, op)
                written += planes
            self._storage.stages.add(written)

    def _with_blocks(self, plane: mx.array, parts: list[mx.array], op: LoadBlocks) -> mx.array:
        """The plane of a slab with the blocks written to it, in place. Whole blocks go to a view of
        the plane in blocks, so that they are copied once."""
        start = op.start
        if start % self._size == 0 == plane.shape[2] % self._size:
            first, stop = start // self._size, op.stop // self._size
            num_slots, kv_heads, capacity, width = plane.shape
            shape = (num_slots, kv_heads, capacity // self._size, self._size, width)
            whole, parts = _split(parts, stop - first)
            if op.slab_id in self._storage.fresh and num_slots == 1 and first == 0:
                # The plane itself is never computed.
                rest_shape = (*shape[:2], shape[2] - stop, *shape[3:])
                rest = self._storage.new_array(rest_shape, plane.dtype)
                blocks = [part.swapaxes(0, 1)[None] for part in whole]
                view = mx.concatenate([*blocks, rest], axis=2)
            else:
                view = plane.reshape(shape)
                for part in whole:
                    view[op.slot, :, first : first + len(part)] = part.swapaxes(0, 1)
                    first += len(part)
            plane, start = view.reshape(plane.shape), stop * self._size
        if start < op.stop:
            tokens = _joined(parts).swapaxes(0, 1).reshape(plane.shape[1], -1, plane.shape[3])
            before = start % self._size
            plane[op.slot, :, start : op.stop] = tokens[:, before : before + op.stop - start]
        return plane

    def _load_state(self, op: LoadState) -> None:
        state = self._states[op.state_id]
        written = []
        for layer, kept in zip(self._windows, state.rings, strict=True):
            planes = self._storage.slabs[op.slab_id].planes[layer]
            for plane, ring in zip(planes, kept, strict=True):
                plane[op.slot, :, : ring.shape[1]] = ring
                written.append(plane)
        self._storage.stages.add(written)
        if self._row_states:
            self._row_states.write(op.row, state.recurrent)


def is_in_host_memory() -> bool:
    """Whether what is written to an array's buffer is what MLX computes with."""
    return bool(mx.default_device() == mx.Device(mx.cpu))


def _unchanged(plane: mx.array) -> mx.array:
    """The plane as it is now, whatever is written to it later."""
    return plane.reshape(plane.shape)


def _joined(parts: list[mx.array]) -> mx.array:
    return parts[0] if len(parts) == 1 else mx.concatenate(parts)


def _split(parts: Sequence[mx.array], count: int) -> tuple[list[mx.array], list[mx.array]]:
    """The first `count` blocks of all parts, and the others."""
    before: list[mx.array] = []
    after: list[mx.array] = []
    for part in parts:
        taken = min(count, len(part))
        count -= taken
        if taken:
            before.append(part[:taken])
        if taken < len(part):
            after.append(part[taken:])
    return before, after


def _take(plane: mx.array, numbers: Sequence[int]) -> mx.array:
    """Those blocks of a segment's plane; a view of it where they lie side by side."""
    first, last = numbers[0], numbers[-1]
    if list(numbers) == list(range(first, last + 1)):
        return plane[first : last + 1]
    return plane[mx.array(list(numbers), mx.int32)]


def _tensors_of(payload: Payload) -> tuple[Tensor, ...]:
    return cast(Record, payload).tensors


def _nowhere(record: Record) -> None:
    """Where what is offloaded goes without a tier."""
