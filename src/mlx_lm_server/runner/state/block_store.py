"""The bytes of the prefix cache: blocks of tokens in a pool, and checkpoints of other state.

A checkpoint has the rest of a row after so many tokens: the rings of layers with a window as they
lie in the slab, and recurrent state.

What the core ordered is done literally and in order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Protocol

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
from mlx_lm_server.core.tier import Label
from mlx_lm_server.runner.state.block_bytes import BlockBytes
from mlx_lm_server.runner.state.block_operations import BlockOperations
from mlx_lm_server.runner.state.block_planes import BlockPlanes, Planes
from mlx_lm_server.runner.state.kv_storage import KVStorage
from mlx_lm_server.runner.state.plane_spans import Span
from mlx_lm_server.runner.state.record_bytes import (
    ArraySpec,
    RecordShapes,
    read_array,
    stacked_bytes,
)
from mlx_lm_server.runner.state.row_states import RowStates
from mlx_lm_server.runner.state.stages import unchanged
from mlx_lm_server.tier import Kind, Record, Tensor


class TierRecords(Protocol):
    """The tier, as far as bytes go."""

    def save(self, record: Record) -> None:
        """Takes what was offloaded."""

    def found(self, name: bytes) -> Record:
        """Returns a record that was read and that a plan names."""


class NoRecords:
    """Where what is offloaded goes without a tier."""

    def save(self, record: Record) -> None:
        pass

    def found(self, name: bytes) -> Record:
        raise LookupError(f"without a tier there is no record {name.hex()}")


class BlockCopies(Protocol):
    """How blocks come and go."""

    def save(self, op: SaveBlocks) -> None:
        """The last block may be filled in part."""

    def load(self, op: LoadBlocks) -> None: ...

    def restore(self, places: Sequence[Place], records: Sequence[Record]) -> None: ...

    def out(self, planes: Planes, spans: Sequence[Span]) -> list[Tensor]:
        """Returns each span of planes of one shape, which are computed, as a tensor
        `[planes, kv_heads, num_tokens, width]` in the host's memory."""


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
        self._windows = [n for n, layer in enumerate(storage.layers) if layer.ring is not None]
        self._states: dict[int, _KeptState] = {}
        self.shapes = RecordShapes(storage.layers, states.parts if states else (), block_size)
        self.tier: TierRecords = NoRecords()
        self._pool = BlockPlanes(storage.layers, block_size, storage.backend.unwritten)
        way = BlockBytes if storage.is_in_host_memory else BlockOperations
        self._copies: BlockCopies = way(storage, self._pool, self.shapes.plane_groups)

    @property
    def nbytes(self) -> int:
        """What the arrays hold now, in bytes."""
        states = self._states.values()
        return self._pool.nbytes + sum(a.nbytes for state in states for a in state.arrays)

    # ---- what rows leave behind

    def save(self, op: SaveOp) -> None:
        match op:
            case CreateSegment():
                self._pool.create(op.segment_id, op.num_blocks)
            case DropSegment():
                self._pool.drop(op.segment_id)
            case MoveBlocks():
                self._move_blocks(op)
            case SaveBlocks():
                self._copies.save(op)
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
                self._copies.restore(op.places, [self.tier.found(name) for name in op.names])
            case RestoreState():
                self._restore_state(op)

    def _move_blocks(self, op: MoveBlocks) -> None:
        by_target = groupby(op.moves, key=lambda move: move[1].segment_id)
        for segment_id, group in by_target:
            moves, segment = list(group), self._pool.segment(segment_id)
            sources = [source for source, _ in moves]
            numbers = mx.array([target.number for _, target in moves], mx.int32)
            num_tokens = len(moves) * self._size
            for layers in self._storage.layer_groups(self._pool.layers, num_tokens):
                written = []
                for layer in layers:
                    gathered = self._pool.gather(layer, sources)
                    for plane, parts in zip(segment[layer], gathered, strict=True):
                        plane[numbers] = parts[0] if len(parts) == 1 else mx.concatenate(parts)
                        written.append(plane)
                self._storage.stages.add(written)

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
            self._offload(self._pool.segment(segment_id), spans, labels)

    def _offload_tokens(self, op: OffloadTokens) -> None:
        spots = zip(op.slots, op.numbers, strict=True)
        spans = [Span(slot, number * self._size, self._size) for slot, number in spots]
        planes = self._storage.slabs[op.slab_id].planes
        self._offload({layer: planes[layer] for layer in self._pool.layers}, spans, op.labels)

    def _offload(
        self, planes: Mapping[int, Planes], spans: Sequence[Span], labels: Sequence[Label]
    ) -> None:
        """Copies of spans, by layer, of the planes as they are now: made between what is written
        before and after, when nothing runs."""
        groups = [
            [unchanged(planes[layer][number]) for layer, number in group]
            for group in self.shapes.plane_groups
        ]

        def give() -> None:
            mx.eval(groups)
            tensors = [self._copies.out(group, spans) for group in groups]
            for number, label in enumerate(labels):
                self._give(label, [copies[number] for copies in tensors])

        num_tokens = sum(span.num_tokens for span in spans)
        self._storage.stages.add_copy(give, num_tokens * self._pool.token_bytes)

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
        self.tier.save(Record(label.name, kind, label.parent, ids, num_tokens, tuple(tensors)))

    def _restore_state(self, op: RestoreState) -> None:
        specs = self.shapes.of_state(op.num_tokens)
        arrays: dict[int, mx.array] = {}
        tensors = self.tier.found(op.name).tensors
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
                self._copies.load(op)
            case CopyTokens():
                self._storage.copy_tokens(op, self._pool.layers)
            case LoadState():
                self._load_state(op)

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
