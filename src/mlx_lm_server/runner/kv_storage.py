"""Where K and V of all running rows live: slabs, as the core's plan lays them out.

Invariants
- A slab's arrays are `[num_slots, kv_heads, capacity, head_dim]`, one for K and one for V a layer.
- Nobody keeps a reference to a slab's array across a step: a second reference would turn the next
  in-place write into a copy of the whole slab.
- What the core ordered (`KVOp`) is done literally and in order; the core keeps the account.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import mlx.core as mx

from mlx_lm_server.core.plan import CreateSlab, DropSlab, KVOp, MoveRow, ResizeSlab


@dataclass(frozen=True, slots=True)
class LayerShape:
    """KV of one token in one layer."""

    kv_heads: int
    key_dim: int
    value_dim: int


@dataclass(slots=True)
class Slab:
    """`keys[layer]`: `[num_slots, kv_heads, capacity, key_dim]`; `values` alike."""

    capacity: int
    keys: list[mx.array] = field(default_factory=list)
    values: list[mx.array] = field(default_factory=list)


class KVStorage:
    """Owned by the model runner, used on the engine's main thread only."""

    def __init__(self, layers: list[LayerShape], dtype: mx.Dtype) -> None:
        self._layers = layers
        self._dtype = dtype
        self.slabs: dict[int, Slab] = {}

    @property
    def bytes_per_token(self) -> int:
        numbers = sum(x.kv_heads * (x.key_dim + x.value_dim) for x in self._layers)
        return numbers * self._dtype.size

    @property
    def nbytes(self) -> int:
        """What the arrays hold now, in bytes."""
        return sum(a.nbytes for s in self.slabs.values() for a in (*s.keys, *s.values))

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
        for layer in self._layers:
            shape = (op.num_slots, layer.kv_heads, op.capacity)
            slab.keys.append(mx.zeros((*shape, layer.key_dim), self._dtype))
            slab.values.append(mx.zeros((*shape, layer.value_dim), self._dtype))
        self.slabs[op.slab_id] = slab

    def _resize(self, op: ResizeSlab) -> None:
        slab = self.slabs[op.slab_id]
        for arrays in (slab.keys, slab.values):
            for layer, array in enumerate(arrays):
                arrays[layer] = _with_slots(array, op.num_slots)

    def _move(self, op: MoveRow) -> None:
        source, target = self.slabs[op.from_slab], self.slabs[op.to_slab]
        for layer in range(len(self._layers)):
            for old, new in ((source.keys, target.keys), (source.values, target.values)):
                row = mx.contiguous(old[layer][op.from_slot, :, : op.num_tokens])
                new[layer][op.to_slot, :, : op.num_tokens] = row


def _with_slots(array: mx.array, num_slots: int) -> mx.array:
    """The array with so many slots: cut, or grown by zeros."""
    missing = num_slots - array.shape[0]
    if missing <= 0:
        return mx.contiguous(array[:num_slots])
    return mx.concatenate([array, mx.zeros((missing, *array.shape[1:]), array.dtype)])
