"""Where K and V of all running rows live: slabs, as the core's plan lays them out.

A layer's tokens lie in *planes*, arrays that hold one part of every token. Whatever is done to
rows and slabs is done to each plane alike.

    plain      keys · values
    quantised  codes, scales, biases of the keys · codes, scales, biases of the values

A layer with a window keeps a *ring*: token `p` lies in place `p % ring`, and its arrays are no
longer than the ring, whatever the slab's capacity.

Invariants
- A plane is `[num_slots, kv_heads, places, width]`, where `places` is the slab's capacity or the
  layer's ring, whichever is less.
- Nobody holds a reference to a slab's array when a write to it is submitted: a second one would
  turn the write, which is in place, into a copy of the whole slab.
- What the core ordered (`KVOp`) is done literally and in order; the core keeps the account.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import mlx.core as mx

from mlx_lm_server.core.kv_geometry import KVGeometry, RingBytes
from mlx_lm_server.core.plan import (
    CopyTokens,
    CreateSlab,
    DropSlab,
    KVOp,
    MoveRow,
    ResizeSlab,
)
from mlx_lm_server.runner.backend import Backend
from mlx_lm_server.runner.state.kv_quantisation import PackedKV, Quantisation
from mlx_lm_server.runner.state.plane_spans import PlaneCopies, Span
from mlx_lm_server.runner.state.stages import Stages, ends_of, unchanged
from mlx_lm_server.runner.state.step_layout import Places, StepLayout

# K or V of some tokens, `[…, dim]`, as they are or in few bits.
Stored = mx.array | PackedKV

# Places of a ring beyond its window, so that as many of the last tokens can be taken back.
RING_SPARE = 8


@dataclass(frozen=True, slots=True)
class PlaneShape:
    """What one plane holds of a token: `[kv_heads, width]`."""

    kv_heads: int
    width: int
    dtype: mx.Dtype

    @property
    def bytes_per_token(self) -> int:
        return self.kv_heads * self.width * self.dtype.size

    def shape(self, num_slots: int, places: int) -> tuple[int, ...]:
        return num_slots, self.kv_heads, places, self.width


@dataclass(frozen=True, slots=True)
class LayerShape:
    """KV of one token in one layer; `window` is how many tokens the layer looks back at."""

    kv_heads: int
    key_dim: int
    value_dim: int
    window: int | None = None
    dtype: mx.Dtype = mx.float32
    quantisation: Quantisation | None = None

    @property
    def is_plain_float32(self) -> bool:
        return self.quantisation is None and self.dtype == mx.float32

    @property
    def kv_bits(self) -> int:
        return 16 if self.quantisation is None else self.quantisation.bits

    @property
    def format(self) -> str:
        """In words, what K and V are kept in."""
        if self.quantisation is None:
            return str(self.dtype).removeprefix("mlx.core.")
        return self.quantisation.name

    @property
    def planes(self) -> tuple[PlaneShape, ...]:
        return (*self._planes_of(self.key_dim), *self._planes_of(self.value_dim))

    def _planes_of(self, dim: int) -> tuple[PlaneShape, ...]:
        if self.quantisation is None:
            return (PlaneShape(self.kv_heads, dim, self.dtype),)
        num_groups = dim // self.quantisation.group_size
        groups = PlaneShape(self.kv_heads, num_groups, self.dtype)
        codes = PlaneShape(self.kv_heads, dim * self.quantisation.bits // 32, mx.uint32)
        return codes, groups, groups

    def to_planes(self, keys: mx.array, values: mx.array) -> tuple[mx.array, ...]:
        """K and V `[…, dim]` as they are stored."""
        if self.quantisation is None:
            return keys, values
        return (*self.quantisation.pack(keys), *self.quantisation.pack(values))

    def of_planes(
        self, planes: Sequence[mx.array], whole: Sequence[mx.array | None] = (None,) * 6
    ) -> tuple[Stored, Stored]:
        """K and V, each of its planes; `whole` are those of the slab of which `planes` are the
        first slots and places."""
        if self.quantisation is None:
            keys, values = planes
            return keys, values
        return (
            PackedKV(planes[0], planes[1], planes[2], self.quantisation, whole[0]),
            PackedKV(planes[3], planes[4], planes[5], self.quantisation, whole[3]),
        )

    @property
    def bytes_per_token(self) -> int:
        return sum(plane.bytes_per_token for plane in self.planes)

    @property
    def ring(self) -> int | None:
        return None if self.window is None else self.window + RING_SPARE

    def num_places(self, capacity: int) -> int:
        return capacity if self.ring is None else min(capacity, self.ring)


@dataclass(slots=True)
class Slab:
    """`planes[layer]` are the layer's, in the order of `LayerShape.planes`."""

    capacity: int
    planes: list[list[mx.array]] = field(default_factory=list)

    @property
    def num_slots(self) -> int:
        return int(self.planes[0][0].shape[0])


class KVStorage:
    """Owned by the model runner, used on the engine's main thread only."""

    def __init__(self, layers: Sequence[LayerShape], backend: Backend) -> None:
        self.layers = list(layers)
        self.slabs: dict[int, Slab] = {}
        self.backend = backend
        self.is_in_host_memory = backend.policy.is_in_host_memory
        self.max_copied_bytes = backend.policy.max_copied_bytes
        self.copies = PlaneCopies(backend.copy_heads)
        # Whether places that no token was written to may be multiplied by zero.
        self.needs_zeros = True
        self.stages = Stages()
        self._written_unread: set[tuple[int, int]] = set()  # (slab_id, layer)

    @property
    def bytes_per_token(self) -> int:
        """Of all layers, as long as no window is full."""
        return sum(layer.bytes_per_token for layer in self.layers)

    @property
    def geometry(self) -> KVGeometry:
        """What a slot takes, for the core's account."""
        full = sum(x.bytes_per_token for x in self.layers if x.ring is None)
        rings: dict[int, int] = {}
        for x in self.layers:
            if x.ring is not None:
                rings[x.ring] = rings.get(x.ring, 0) + x.bytes_per_token
        return KVGeometry(full, tuple(RingBytes(*item) for item in sorted(rings.items())))

    @property
    def nbytes(self) -> int:
        """What the arrays hold now, in bytes."""
        return self.slab_bytes(self.slabs)

    def slab_bytes(self, slab_ids: Iterable[int]) -> int:
        """Returns what the arrays of these slabs hold."""
        slabs = [self.slabs[slab_id] for slab_id in slab_ids]
        return sum(plane.nbytes for slab in slabs for planes in slab.planes for plane in planes)

    # ---- what the core orders

    def apply(self, *ops: KVOp) -> None:
        """Does it all for some layers, then for the next ones: beyond what is held before or after
        no more is needed meanwhile than what some layers take."""
        for op in ops:
            if isinstance(op, CreateSlab):
                self.slabs[op.slab_id] = Slab(op.capacity, [[] for _ in self.layers])
        for layers in self.layer_groups(range(len(self.layers)), self._tokens_touched(ops)):
            _Changes(self, layers).make(ops)
        for op in ops:
            if isinstance(op, DropSlab):
                del self.slabs[op.slab_id]

    def _tokens_touched(self, ops: Sequence[KVOp]) -> int:
        """For how many tokens memory is taken or given up."""
        num_tokens = 0
        for op in ops:
            match op:
                case CreateSlab() | ResizeSlab():
                    num_tokens += op.num_slots * self.slabs[op.slab_id].capacity
                case MoveRow():
                    num_tokens += op.num_tokens
                case DropSlab():
                    pass
        return max(1, num_tokens)

    def new_array(self, shape: tuple[int, ...], dtype: mx.Dtype) -> mx.array:
        """For places that no token was written to yet."""
        return (mx.zeros if self.needs_zeros else self.backend.unwritten)(shape, dtype)

    def copy_tokens(self, op: CopyTokens, layers: Sequence[int]) -> None:
        """Between slots, of these layers. A ring is copied as it lies, whole from token 0, and by
        operations: a checkpoint may share its memory."""
        whole = [n for n in layers if self.is_in_host_memory and self.layers[n].ring is None]
        if whole:
            ends = self._all_planes(op.from_slab, whole), self._all_planes(op.to_slab, whole)
            num_tokens = op.stop - op.start
            old, new = (Span(slot, op.start, num_tokens) for slot in (op.from_slot, op.to_slot))
            self.copy_bytes(list(zip(*ends, strict=True)), [(old, new)])
        others = [layer for layer in layers if layer not in whole]
        for group in self.layer_groups(others, op.stop - op.start):
            self.stages.add(self.copy_by_operations(op, group))

    def copy_by_operations(self, op: CopyTokens, layers: Sequence[int]) -> list[mx.array]:
        """Returns the planes that are written, for a stage. Between the slots of one slab what is
        read is a stage of its own, before it."""
        pairs = []
        ends = self._all_planes(op.from_slab, layers), self._all_planes(op.to_slab, layers)
        for old, new in zip(*ends, strict=True):
            tokens = old[op.from_slot, :, op.start : min(op.stop, old.shape[2])]
            pairs.append((tokens, new))
        if op.from_slab == op.to_slab:
            pairs = [(mx.contiguous(tokens), new) for tokens, new in pairs]
            self.stages.add([tokens for tokens, _ in pairs])
        for tokens, new in pairs:
            new[op.to_slot, :, op.start : op.start + tokens.shape[1]] = tokens
        return [new for _, new in pairs]

    def _all_planes(self, slab_id: int, layers: Sequence[int]) -> list[mx.array]:
        return [plane for layer in layers for plane in self._planes(layer, slab_id)]

    def copy_bytes(
        self, pairs: Sequence[tuple[mx.array, mx.array]], spans: Sequence[tuple[Span, Span]]
    ) -> None:
        """In each pair of planes from the first span of each pair to the second, between what is
        written before and after, when nothing runs. Nobody shares the memory of the second."""
        held = [(unchanged(source), unchanged(target)) for source, target in pairs]

        def copy() -> None:
            mx.eval(held)
            self.copies.between(held, spans)

        num_tokens = sum(span.num_tokens for span, _ in spans)
        token_bytes = sum(p.shape[1] * p.shape[3] * p.itemsize for p, _ in pairs)
        self.stages.add_copy(copy, num_tokens * token_bytes)

    def layer_groups(self, layers: Sequence[int], num_tokens: int) -> Iterator[Sequence[int]]:
        """Layers whose state of so many tokens may be copied at once."""
        if not layers:
            return
        largest = max(self.layers[layer].bytes_per_token for layer in layers) * num_tokens
        at_once = max(1, self.max_copied_bytes // max(1, largest))
        for first in range(0, len(layers), at_once):
            yield layers[first : first + at_once]

    # ---- what a layer reads and writes

    def write_tokens(
        self, layer: int, layout: StepLayout, keys: mx.array, values: mx.array
    ) -> None:
        """The new tokens of decode rows, of all `[T, kv_heads, 1, dim]`."""
        for number, group in enumerate(layout.decodes):
            planes = self._planes(layer, group.slab_id)
            _, kv_heads, num_places, _ = planes[0].shape
            places = layout.array(Places(number, kv_heads, num_places))
            tokens = keys[group.tokens], values[group.tokens]
            new_planes = self.layers[layer].to_planes(*tokens)
            for n, (plane, new) in enumerate(zip(planes, new_planes, strict=True)):
                flat = plane.reshape(-1, plane.shape[-1])
                flat[places] = new.reshape(-1, plane.shape[-1])
                planes[n] = flat.reshape(plane.shape)

    def was_written(self, layer: int, slab_ids: Iterable[int], by: mx.array) -> mx.array:
        """To the memory of these slabs, in the computation of an array: who reads what they hold
        from now on waits for it. Gives that array for further use."""
        written = []
        for slab_id in slab_ids:
            planes = self._planes(layer, slab_id)
            # One by one: MLX holds what one operation gives together, and a plane that is held
            # would be copied by the next operation that writes to it.
            planes[:] = [mx.depends([plane], [by])[0] for plane in planes]
            written += planes
        # Planes that nobody computes would hold the array until the next step.
        after: mx.array = mx.depends([by], written)[0]
        return after

    def write_chunk(
        self, layer: int, slab_id: int, slot: int, start: int, keys: mx.array, values: mx.array
    ) -> None:
        """Tokens of one row, `[kv_heads, L, dim]`, of a layer without a window."""
        places = slice(start, start + keys.shape[1])
        new_planes = self.layers[layer].to_planes(keys, values)
        for plane, new in zip(self._planes(layer, slab_id), new_planes, strict=True):
            _put(plane, slot, places, new)

    def read_slots(
        self, layer: int, slab_id: int, num_slots: int, length: int
    ) -> tuple[Stored, Stored]:
        """`[num_slots, kv_heads, length, dim]`: the first slots' first places, as they are."""
        whole = self._planes(layer, slab_id)
        planes = [plane[:num_slots, :, :length] for plane in whole]
        return self.layers[layer].of_planes(planes, whole)

    def read_row(
        self, layer: int, slab_id: int, slot: int, num_tokens: int
    ) -> tuple[mx.array, mx.array]:
        """`[kv_heads, num_tokens, dim]` of a layer without a window."""
        planes = [plane[slot, :, :num_tokens] for plane in self._planes(layer, slab_id)]
        return self._read_planes(layer, planes)

    def extend_ring(
        self, layer: int, slab_id: int, slot: int, start: int, keys: mx.array, values: mx.array
    ) -> tuple[mx.array, mx.array]:
        """Write tokens of one row to its ring, and give them, as they read back, with those before
        that they see: the last `window - 1`, all `[kv_heads, …, dim]`."""
        planes, shape = self._planes(layer, slab_id), self.layers[layer]
        assert shape.window is not None
        assert shape.ring is not None
        num_before = min(start, shape.window - 1)
        before = _places(range(start - num_before, start), shape.ring)
        kept = min(keys.shape[1], planes[0].shape[2])
        end = start + keys.shape[1]
        places = _places(range(end - kept, end), shape.ring)
        seen = []
        for plane, new in zip(planes, shape.to_planes(keys, values), strict=True):
            whole = new
            if num_before:
                whole = mx.concatenate([plane[slot, :][:, before], new], axis=1)
            last = mx.depends([new[:, -kept:]], [whole])[0]
            _put(plane, slot, places, last)
            seen.append(mx.contiguous(whole))
        self._written_unread.add((slab_id, layer))
        return self._read_planes(layer, seen)

    def read(self, stored: Stored) -> mx.array:
        """Returns the numbers, whatever they are kept in."""
        return self.backend.read(stored) if isinstance(stored, PackedKV) else stored

    def _read_planes(self, layer: int, planes: Sequence[mx.array]) -> tuple[mx.array, mx.array]:
        """K and V `[…, dim]` as the planes give them back."""
        keys, values = self.layers[layer].of_planes(planes)
        return self.read(keys), self.read(values)

    def keys_and_values(self, layer: int, slab_id: int) -> tuple[mx.array, mx.array]:
        """All of a slab, of a layer that is not quantised: `[slots, kv_heads, places, dim]`."""
        keys, values = self._planes(layer, slab_id)
        return keys, values

    def take_unread(self) -> list[mx.array]:
        """The ends of what the forward wrote and does not read, so that it is computed with it."""
        written = [self._planes(layer, slab_id) for slab_id, layer in self._written_unread]
        self._written_unread.clear()
        return ends_of(plane for planes in written for plane in planes)

    def _planes(self, layer: int, slab_id: int) -> list[mx.array]:
        return self.slabs[slab_id].planes[layer]


class _Changes:
    """What the core ordered, for some layers. As much of it as can be makes one stage: a slab is
    written in place only when nothing before in the stage reads it."""

    def __init__(self, storage: KVStorage, layers: Sequence[int]) -> None:
        self._storage = storage
        self._layers = layers
        self._written: dict[int, list[mx.array]] = {}  # by slab
        self._read: set[int] = set()  # slabs

    def make(self, ops: Sequence[KVOp]) -> None:
        for op in ops:
            match op:
                case CreateSlab():
                    self._create(op)
                case ResizeSlab():
                    self._resize(op)
                case DropSlab():
                    self._end_stage()
                    for layer in self._layers:
                        self._storage.slabs[op.slab_id].planes[layer].clear()
                case MoveRow():
                    self._move(op)
        self._end_stage()

    def _end_stage(self) -> None:
        self._storage.stages.add([plane for planes in self._written.values() for plane in planes])
        self._written.clear()
        self._read.clear()

    def _create(self, op: CreateSlab) -> None:
        storage = self._storage
        slab = storage.slabs[op.slab_id]
        for number in self._layers:
            layer = storage.layers[number]
            places = layer.num_places(op.capacity)
            shapes = [(plane.shape(op.num_slots, places), plane.dtype) for plane in layer.planes]
            slab.planes[number] = [storage.new_array(*each) for each in shapes]
        if storage.needs_zeros:
            self._written[op.slab_id] = self._planes(op.slab_id)

    def _resize(self, op: ResizeSlab) -> None:
        for layer in self._layers:
            planes = self._storage.slabs[op.slab_id].planes[layer]
            planes[:] = [self._with_slots(plane, op.num_slots) for plane in planes]
        self._written[op.slab_id] = self._planes(op.slab_id)

    def _with_slots(self, plane: mx.array, num_slots: int) -> mx.array:
        num_kept = min(num_slots, plane.shape[0])
        if num_kept == num_slots:
            return mx.contiguous(plane[:num_slots])
        larger = self._storage.new_array((num_slots, *plane.shape[1:]), plane.dtype)
        larger[:num_kept] = plane
        return larger

    def _move(self, op: MoveRow) -> None:
        storage = self._storage
        copy = CopyTokens(op.from_slab, op.from_slot, op.to_slab, op.to_slot, 0, op.num_tokens)
        if storage.is_in_host_memory:
            self._end_stage()
            storage.copy_tokens(copy, self._layers)
            return
        if op.to_slab in self._read or op.from_slab == op.to_slab:
            self._end_stage()
        self._read.add(op.from_slab)
        self._written[op.to_slab] = storage.copy_by_operations(copy, self._layers)

    def _planes(self, slab_id: int) -> list[mx.array]:
        planes = self._storage.slabs[slab_id].planes
        return [plane for layer in self._layers for plane in planes[layer]]


def _places(tokens: range, ring: int) -> slice | mx.array:
    """Where in the ring consecutive tokens lie."""
    if len(tokens) == 0:
        return slice(0, 0)
    first = tokens.start % ring
    if first + len(tokens) <= ring:
        return slice(first, first + len(tokens))
    return mx.array([token % ring for token in tokens], mx.int32)


def _put(plane: mx.array, slot: int, places: slice | mx.array, tokens: mx.array) -> None:
    """Write tokens `[kv_heads, n, width]` to a slot, in place."""
    if tokens.size == plane.size:  # then MLX would take them for the plane, as they lie
        tokens = mx.contiguous(tokens)
    plane[slot, :, places] = tokens
