"""How slabs are made: which sizes they come in, how they grow, and how many there may be."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass

SMALL_CAPACITIES = (64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096)
STEPS_PER_OCTAVE = 16
SMALL_STEP = 32
DEFAULT_MAX_SLAB_BYTES = 64 * 1024 * 1024
# A slot may be so much larger than what its row asked for.
MAX_SHARED_CAPACITY_RATIO = 1.5
# Attention calls a layer for all rows that decode, where it does not pass over holes.
MAX_SLABS = 6
# Where slabs are counted, all slots together may.
MAX_HELD_RATIO = 1.2


@dataclass(frozen=True, slots=True)
class SlabRules:
    """A value that the scheduler's layout is made with.

    - `max_slab_bytes` is what one slab of several rows may hold, `max_resized_bytes` one that is
      made larger by a copy (None: any).
    - `keeps_holes`: attention passes over slots without a row, so that rows stay where they are.
    - `capacity_step`: capacities beyond it are multiples of it, others of `SMALL_STEP`; None for
      few classes, whose slots rows of different length share.
    - `max_slabs`: rows are brought together where there would be more slabs, each of which is one
      attention call a layer; and slots are not larger, nor are there more to spare, than
      `MAX_HELD_RATIO` allows. None where neither matters.
    """

    max_slab_bytes: int = DEFAULT_MAX_SLAB_BYTES
    max_resized_bytes: int | None = None
    keeps_holes: bool = False
    capacity_step: int | None = None
    max_slabs: int | None = None

    @property
    def max_shared_ratio(self) -> float:
        return MAX_SHARED_CAPACITY_RATIO if self.max_slabs is None else MAX_HELD_RATIO

    def capacity_for(self, num_tokens: int) -> int:
        """Returns the smallest capacity that holds `num_tokens`; of large ones at most a sixteenth
        over them."""
        if self.capacity_step is None and num_tokens <= SMALL_CAPACITIES[-1]:
            return SMALL_CAPACITIES[bisect_left(SMALL_CAPACITIES, num_tokens)]
        octave = 1 << max(0, (num_tokens - 1).bit_length() - 1)
        is_small = num_tokens <= (self.capacity_step or 0)
        step = SMALL_STEP if is_small else max(self.capacity_step or 1, octave // STEPS_PER_OCTAVE)
        return -(-num_tokens // step) * step

    def max_slots(self, num_slots: int, slot_bytes: int) -> int:
        """Returns how many slots a slab may have that has so many: one that is made already must
        be copied to have more."""
        if num_slots == 0:
            return max(1, self.max_slab_bytes // slot_bytes)
        most = self.max_slab_bytes if self.max_resized_bytes is None else self.max_resized_bytes
        return max(num_slots, most // slot_bytes)
