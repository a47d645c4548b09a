"""Where K and V of all running rows live: slabs, as the core's plan lays them out.

A layer with a window keeps a *ring*: token `p` lies in place `p % ring`, and its arrays are no
longer than the ring, whatever the slab's capacity.

Invariants
- A slab's arrays are `[num_slots, kv_heads, places, head_dim]`, one for K and one for V a layer,
  where `places` is the slab's capacity or the layer's ring, whichever is less.
- Nobody keeps a reference to a slab's array across a step: a second reference would turn the next
  in-place write into a copy of the whole slab.
- What the core ordered (`KVOp`) is done literally and in order; the core keeps the account.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import mlx.core as mx

from mlx_lm_server.core.kv_geometry import KVGeometry, RingBytes
from mlx_lm_server.core.plan import CreateSlab, DropSlab, KVOp, MoveRow, ResizeSlab

# Places of a ring beyond its window, so that as many of the last tokens can be taken back.
RING_SPARE = 8


@dataclass(frozen=True, slots=True)
class LayerShape:
    """KV of one token in one layer; `window` is how many tokens the layer looks back at."""

    kv_heads: int
    key_dim: int
    value_dim: int
    window: int | None = None
    dtype: mx.Dtype | None = None

    @property
    def ring(self) -> int | None:
        return None if self.window is None else self.window + RING_SPARE

    def num_places(self, capacity: int) -> int:
        return capacity if self.ring is None else min(capacity, self.ring)


@dataclass(slots=True)
class Slab:
    """`keys[layer]`: `[num_slots, kv_heads, places, key_dim]`; `values` alike."""

    capacity: int
    keys: list[mx.array] = field(default_factory=list)
    values: list[mx.array] = field(default_factory=list)


class KVStorage:
    """Owned by the model runner, used on the engine's main thread only."""

    def __init__(self, layers: Sequence[LayerShape], dtype: mx.Dtype) -> None:
        self.layers = list(layers)
        self._dtype = dtype
        self.slabs: dict[int, Slab] = {}
        self._written_unread: set[tuple[int, int]] = set()  # (slab_id, layer)

    @property
    def bytes_per_token(self) -> int:
        """Of all layers, as long as no window is full."""
        return sum(self._bytes_per_token(layer) for layer in self.layers)

    @property
    def geometry(self) -> KVGeometry:
        """What a slot takes, for the core's account."""
        full = sum(self._bytes_per_token(x) for x in self.layers if x.ring is None)
        rings: dict[int, int] = {}
        for x in self.layers:
            if x.ring is not None:
                rings[x.ring] = rings.get(x.ring, 0) + self._bytes_per_token(x)
        return KVGeometry(full, tuple(RingBytes(*item) for item in sorted(rings.items())))

    @property
    def nbytes(self) -> int:
        """What the arrays hold now, in bytes."""
        return sum(a.nbytes for s in self.slabs.values() for a in (*s.keys, *s.values))

    def _bytes_per_token(self, layer: LayerShape) -> int:
        size = (layer.dtype or self._dtype).size
        return layer.kv_heads * (layer.key_dim + layer.value_dim) * size

    # ---- what the core orders

    def apply(self, op: KVOp) -> None:
        match op:
            case CreateSlab():
                self._create(op)
            case ResizeSlab():
                self._resize(op)
            case DropSlab():
                del self.slabs[op.slab_id]
            case MoveRow():
                self._move(op)

    def _create(self, op: CreateSlab) -> None:
        slab = Slab(op.capacity)
        for layer in self.layers:
            shape = (op.num_slots, layer.kv_heads, layer.num_places(op.capacity))
            dtype = layer.dtype or self._dtype
            slab.keys.append(mx.zeros((*shape, layer.key_dim), dtype))
            slab.values.append(mx.zeros((*shape, layer.value_dim), dtype))
        self.slabs[op.slab_id] = slab

    def _resize(self, op: ResizeSlab) -> None:
        slab = self.slabs[op.slab_id]
        for arrays in (slab.keys, slab.values):
            for layer, array in enumerate(arrays):
                arrays[layer] = _with_slots(array, op.num_slots)

    def _move(self, op: MoveRow) -> None:
        source, target = self.slabs[op.from_slab], self.slabs[op.to_slab]
        for layer in range(len(self.layers)):
            for old, new in ((source.keys, target.keys), (source.values, target.values)):
                places = min(op.num_tokens, old[layer].shape[2])
                row = mx.contiguous(old[layer][op.from_slot, :, :places])
                new[layer][op.to_slot, :, :places] = row

    # ---- what a layer reads and writes

    def write_tokens(
        self,
        layer: int,
        slab_id: int,
        slots: mx.array,
        places: mx.array,
        keys: mx.array,
        values: mx.array,
    ) -> None:
        """One token of each of n slots: keys and values `[n, kv_heads, dim]`."""
        slab = self.slabs[slab_id]
        slab.keys[layer][slots, :, places] = keys
        slab.values[layer][slots, :, places] = values

    def write_chunk(
        self, layer: int, slab_id: int, slot: int, start: int, keys: mx.array, values: mx.array
    ) -> None:
        """Tokens of one row, `[kv_heads, L, dim]`, of a layer without a window."""
        slab = self.slabs[slab_id]
        places = slice(start, start + keys.shape[1])
        slab.keys[layer][slot, :, places] = keys
        slab.values[layer][slot, :, places] = values

    def read_row(
        self, layer: int, slab_id: int, slot: int, num_tokens: int
    ) -> tuple[mx.array, mx.array]:
        """`[kv_heads, num_tokens, dim]` of a layer without a window."""
        slab = self.slabs[slab_id]
        return slab.keys[layer][slot, :, :num_tokens], slab.values[layer][slot, :, :num_tokens]

    def extend_ring(
        self, layer: int, slab_id: int, slot: int, start: int, keys: mx.array, values: mx.array
    ) -> tuple[mx.array, mx.array]:
        """Write tokens of one row to its ring, and give them with those before that they see:
        the last `window - 1`, all `[kv_heads, …, dim]`."""
        slab, shape = self.slabs[slab_id], self.layers[layer]
        assert shape.window is not None
        assert shape.ring is not None
        num_before = min(start, shape.window - 1)
        before = _places(range(start - num_before, start), shape.ring)
        kept = min(keys.shape[1], slab.keys[layer].shape[2])
        end = start + keys.shape[1]
        places = _places(range(end - kept, end), shape.ring)
        seen = []
        for arrays, new in ((slab.keys, keys), (slab.values, values)):
            whole = new
            if num_before:
                whole = mx.concatenate([arrays[layer][slot][:, before], new], axis=1)
            last = mx.depends([new[:, -kept:]], [whole])[0]
            arrays[layer][slot, :, places] = last
            seen.append(whole)
        self._written_unread.add((slab_id, layer))
        return seen[0], seen[1]

    def take_unread(self) -> list[mx.array]:
        """Arrays that the forward wrote and does not read, so that they are computed with it."""
        arrays = []
        for slab_id, layer in self._written_unread:
            slab = self.slabs[slab_id]
            arrays += [slab.keys[layer], slab.values[layer]]
        self._written_unread.clear()
        return arrays


def _places(tokens: range, ring: int) -> slice | mx.array:
    """Where in the ring consecutive tokens lie."""
    if len(tokens) == 0:
        return slice(0, 0)
    first = tokens.start % ring
    if first + len(tokens) <= ring:
        return slice(first, first + len(tokens))
    return mx.array([token % ring for token in tokens], mx.int32)


def _with_slots(array: mx.array, num_slots: int) -> mx.array:
    """The array with so many slots: cut, or grown by zeros."""
    missing = num_slots - array.shape[0]
    if missing <= 0:
        return mx.contiguous(array[:num_slots])
    return mx.concatenate([array, mx.zeros((missing, *array.shape[1:]), array.dtype)])
