"""What goes to the tier, and when: a bounded amount in each step.

- With write-through, whatever is kept in memory is due as soon as it is there: blocks as soon as a
  row has filled them, so that a crash loses little of long answers too.
- Else what leaves memory is offloaded just before. A step that has to make much room at once could
  then offload a part only, so the oldest entries are due already when memory becomes short.
- At the engine's end all is due that only memory has.

Whether there is room in the tier is asked before anybody extracts the bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import islice

from mlx_lm_server.core.block import Block, State
from mlx_lm_server.core.plan import OffloadBlocks, OffloadState, OffloadTokens, SaveOp
from mlx_lm_server.core.slabs import Location
from mlx_lm_server.core.tier import Label, Tier

# Of what is due, in one step; at least one entry.
MAX_DUE_BYTES, MAX_DUE_ENTRIES = 4 << 20, 16
# Of what a step has to evict and of what is due, together.
MAX_STEP_BYTES, MAX_STEP_ENTRIES = 32 << 20, 64
# Blocks of running rows go in groups of so many, or after so many steps.
MIN_ROW_BLOCKS, MAX_WAIT_STEPS = 8, 8
# Of the oldest entries so many are looked at in a step when memory is short.
MAX_LOOKED_AT = 32

Entry = Block | State


class Offloads:
    """Owned by the cache store, to whose operations it adds its own. `location` says where a row
    lies."""

    def __init__(
        self, tier: Tier, block_size: int, block_bytes: int, location: Callable[[int], Location]
    ) -> None:
        self._tier = tier
        self._location = location
        self._block_size = block_size
        self._block_bytes = block_bytes
        self._due: dict[Entry, None] = {}  # an ordered set
        self._planned: set[bytes] = set()  # in this step
        self._planned_bytes = 0
        self._num_steps_waited = 0
        self._keeps_all = False

    @property
    def has_due(self) -> bool:
        """Whether a step would offload something now."""
        return bool(self._due) and self._tier.has_room(1)

    @property
    def has_any(self) -> bool:
        return bool(self._due)

    def begin(self) -> None:
        self._planned.clear()
        self._planned_bytes = 0

    def note_kept(self, entries: Iterable[Entry]) -> None:
        """They are in memory now, and the runner will have their bytes by the next step."""
        if self._tier.writes_through or self._keeps_all:
            self.add_due(entries)

    def keep_all(self, entries: Iterable[Entry]) -> None:
        """The engine is about to end: these are due, and whatever comes to be kept."""
        self._keeps_all = True
        self.add_due(entries)

    def add_due(self, entries: Iterable[Entry]) -> None:
        self._due.update((entry, None) for entry in entries if not self._is_stored(entry))

    def drop(self, entry: Entry) -> None:
        """Neither the pool nor a row has it any more."""
        self._due.pop(entry, None)

    def before_eviction(self, entry: Entry, saves: list[SaveOp]) -> None:
        if self._is_stored(entry):
            return
        is_much = len(self._planned) >= MAX_STEP_ENTRIES or self._planned_bytes >= MAX_STEP_BYTES
        if is_much or not self._tier.has_room(self._planned_bytes + self._bytes_of(entry)):
            self._tier.note_refused()
        else:
            self._plan(entry, saves)

    def of_oldest(self, oldest: Iterable[Entry], saves: list[SaveOp]) -> None:
        """Memory is short, and these are the next to go."""
        self._plan_all(islice(oldest, MAX_LOOKED_AT), saves)

    def of_due(self, saves: list[SaveOp]) -> None:
        self._num_steps_waited += 1
        if self._is_early:
            return
        self._num_steps_waited = 0
        for entry in self._plan_all(list(self._due), saves):
            del self._due[entry]

    @property
    def _is_early(self) -> bool:
        """Whether only few blocks are due, of rows that run on: soon there are more for one
        operation."""
        return (
            len(self._due) < MIN_ROW_BLOCKS
            and self._num_steps_waited < MAX_WAIT_STEPS
            and all(isinstance(entry, Block) and entry.place is None for entry in self._due)
        )

    def _plan_all(self, entries: Iterable[Entry], saves: list[SaveOp]) -> list[Entry]:
        """As many as a step may; gives those that need no more thought."""
        settled = []
        for entry in entries:
            if not self._is_stored(entry):
                num_bytes = self._planned_bytes + self._bytes_of(entry)
                is_much = len(self._planned) >= MAX_DUE_ENTRIES or num_bytes > MAX_DUE_BYTES
                if (is_much and self._planned) or not self._tier.has_room(num_bytes):
                    break
                self._plan(entry, saves)
            settled.append(entry)
        return settled

    def _is_stored(self, entry: Entry) -> bool:
        name = Label.of(entry).name if isinstance(entry, State) else entry.name
        return name in self._planned or self._tier.has(name)

    def _plan(self, entry: Entry, saves: list[SaveOp]) -> None:
        label = Label.of(entry)
        self._planned.add(label.name)
        self._planned_bytes += self._bytes_of(entry)
        if isinstance(entry, State):
            saves.append(OffloadState(entry.state_id, label))
            return
        if entry.place is None:
            self._plan_in_row(entry, label, saves)
            return
        last = saves[-1] if saves else None
        if isinstance(last, OffloadBlocks):
            places, labels = (*last.places, entry.place), (*last.labels, label)
            saves[-1] = OffloadBlocks(places, labels)
        else:
            saves.append(OffloadBlocks((entry.place,), (label,)))

    def _plan_in_row(self, block: Block, label: Label, saves: list[SaveOp]) -> None:
        assert block.rows, "only what the pool or a row holds is offloaded"
        slab_id, slot = self._location(next(iter(block.rows)))
        number = block.num_tokens // self._block_size - 1
        last = saves[-1] if saves else None
        if isinstance(last, OffloadTokens) and last.slab_id == slab_id:
            slots, numbers = (*last.slots, slot), (*last.numbers, number)
            saves[-1] = OffloadTokens(slab_id, slots, numbers, (*last.labels, label))
        else:
            saves.append(OffloadTokens(slab_id, (slot,), (number,), (label,)))

    def _bytes_of(self, entry: Entry) -> int:
        if isinstance(entry, State):
            return entry.num_bytes
        return self._block_bytes * len(entry.token_ids) // self._block_size
