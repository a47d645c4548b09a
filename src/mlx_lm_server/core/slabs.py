"""Slabs on paper, and the operations that make the runner's like them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import NamedTuple

from mlx_lm_server.core.plan import CreateSlab, DropSlab, KVOp, ResizeSlab

Sizes = Mapping[int, int]  # slots by slab


class Location(NamedTuple):
    slab_id: int
    slot: int


@dataclass(slots=True, eq=False)
class Slab:
    """`num_slots` is what the runner holds (0: not made yet), `rows` who is in it on paper,
    `source_id` the slab whose rows grow into it, `was_left` whether a row went since the last
    `settle`."""

    slab_id: int
    capacity: int
    num_slots: int = 0
    source_id: int | None = None
    was_left: bool = False
    rows: dict[int, None] = field(default_factory=dict)  # an ordered set

    @property
    def has_free_slot(self) -> bool:
        return len(self.rows) < self.num_slots

    def num_spare_tokens(self, num_slots: int) -> int:
        return (num_slots - len(self.rows)) * self.capacity

    def slots(self, end: int, settled: Mapping[int, Location]) -> list[tuple[int, int]]:
        """Returns each row's slot below `end`. Rows that are there already stay; the others and
        those that come fill the holes."""
        staying: dict[int, int] = {}
        to_fill_holes: list[int] = []
        for row in self.rows:
            before = settled.get(row)
            if before is not None and before.slab_id == self.slab_id and before.slot < end:
                staying[before.slot] = row
            else:
                to_fill_holes.append(row)
        holes = islice((n for n in range(end) if n not in staying), len(to_fill_holes))
        kept = [(row, slot) for slot, row in staying.items()]
        return kept + list(zip(to_fill_holes, holes, strict=True))


def enlarge(slabs: Iterable[Slab], sizes: Sizes) -> list[KVOp]:
    """Makes slabs that are smaller than their sizes larger. Returns the operations for it."""
    ops: list[KVOp] = []
    for slab in slabs:
        size = sizes[slab.slab_id]
        if size <= slab.num_slots:
            continue
        if slab.num_slots == 0:
            ops.append(CreateSlab(slab.slab_id, size, slab.capacity))
        else:
            ops.append(ResizeSlab(slab.slab_id, size))
        slab.num_slots = size
    return ops


def reduce(slabs: Iterable[Slab], sizes: Sizes) -> list[KVOp]:
    """Makes slabs that are larger than their sizes smaller. Returns the operations for it."""
    ops: list[KVOp] = []
    for slab in slabs:
        size = sizes[slab.slab_id]
        if size < slab.num_slots:
            ops.append(ResizeSlab(slab.slab_id, size) if size else DropSlab(slab.slab_id))
            slab.num_slots = size
    return ops
