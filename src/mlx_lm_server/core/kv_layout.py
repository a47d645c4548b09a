"""Where the rows' K and V lie: a pure allocator of slabs and slots (the picture is in plan.py).

During a step rows are placed, grown and released on paper. `settle` then chooses the slots and
returns the operations that lead from the layout before to the layout now, so that a slot that one
row leaves and another takes costs no copy. What `settle` keeps true:

- the slots in use are the first ones of their slab, and a row that leaves makes at most one other
  row move; where attention passes over slots without a row (`keeps_holes`), rows stay where they
  are instead, and those that come fill the holes;
- a slab doubles its slots when it is full, which copies it, up to `max_resized_bytes`; beyond, the
  next slab of its class is made twice as large, up to `max_slab_bytes`;
- a slab halves its slots at a quarter's use, unless memory is ample, and goes when it is empty;
- a slab that is made for a row that grows has slots for its neighbours too, who will follow;
- where the number of slabs is bounded, rows of like length are brought together when one more
  would be made, and rows near the end of their slots grow with the first of them that has to;
- `used_bytes` and `cached_bytes` are never over `limit_bytes` together. What an operation needs
  while it runs is not counted here: the runner changes some layers after the other, and the ledger
  has those in its reserve.
"""

from __future__ import annotations

from collections.abc import Mapping

from mlx_lm_server.core.kv_geometry import MAX_ROW_TOKENS, KVGeometry
from mlx_lm_server.core.like_lengths import Bounds, together
from mlx_lm_server.core.plan import KVOp, MoveRow
from mlx_lm_server.core.slab_rules import MAX_HELD_RATIO, SlabRules
from mlx_lm_server.core.slabs import Location, Slab, enlarge, reduce

# Memory is ample where slots take no more than the first share of it, which the prefix cache leaves
# to them, or where the second is left.
SLOTS_SHARE, AMPLE_SHARE = 1 / 8, 1 / 4
# Where the number of slabs is bounded, a row with less than such a share of its slot left grows
# with its neighbour.
NEAR_END_SHARE = 1 / 16
# … and such a part of the memory may go to slots that are larger than what rows asked for.
LITTLE_PART = 128
DEFAULT_RULES = SlabRules()


class KVLayout:
    """Slabs, slots and the row in each. Owned by the scheduler.

    `geometry` says what slots and rows take, `limit_bytes` is what all of them together may hold;
    `max_rows` is how many rows there can be and `max_tokens` how long one. A row number that is
    released may be placed again only after the next `settle`.
    """

    def __init__(
        self,
        geometry: KVGeometry,
        limit_bytes: int,
        rules: SlabRules = DEFAULT_RULES,
        max_rows: int = 32,
        max_tokens: int = MAX_ROW_TOKENS,
    ) -> None:
        self.geometry = geometry
        self.limit_bytes = limit_bytes
        self.cached_bytes = 0  # what the prefix cache has taken of them
        self._limit_tokens = geometry.tokens_in(limit_bytes, max_tokens)
        self._rules = rules
        self._max_rows = max_rows
        self._slabs: dict[int, Slab] = {}
        self._slab_of: dict[int, Slab] = {}
        self._wanted: dict[int, int] = {}  # the capacity that each row asked for
        self._num_tokens: dict[int, int] = {}
        self._settled: dict[int, Location] = {}
        self._needed_bytes = 0  # of all rows without any free slot
        self._next_slab_id = 0
        self._is_settled = True

    # ---- what is held

    @property
    def used_bytes(self) -> int:
        """What the runner holds after the operations of the last `settle`."""
        return self._bytes_of({slab.slab_id: slab.num_slots for slab in self._slabs.values()})

    @property
    def spare_bytes(self) -> int:
        """What neither rows nor slots nor the prefix cache have taken."""
        return self.limit_bytes - self.cached_bytes - self._taken_bytes

    @property
    def _taken_bytes(self) -> int:
        return max(self.used_bytes, self._comfortable_bytes(self._needed_bytes))

    def _comfortable_bytes(self, needed_bytes: int) -> int:
        """Returns what rows that need so much hold in few slabs: some more, and a little in any
        case."""
        if not self._is_parted:
            return needed_bytes
        little = self.limit_bytes // LITTLE_PART if needed_bytes else 0
        return max(int(MAX_HELD_RATIO * needed_bytes), needed_bytes + little)

    @property
    def spare_bytes_to_cache(self) -> int:
        """Of them, what the prefix cache may take: rows find some memory without an eviction."""
        in_slots = self._taken_bytes
        kept_for_slots = max(0, int(SLOTS_SHARE * self.limit_bytes) - in_slots)
        return self.spare_bytes - kept_for_slots

    @property
    def _is_ample(self) -> bool:
        is_little = self.used_bytes <= SLOTS_SHARE * self.limit_bytes
        return is_little or self.spare_bytes >= AMPLE_SHARE * self.limit_bytes

    @property
    def live_tokens(self) -> int:
        return sum(self._num_tokens.values())

    @property
    def num_slabs(self) -> int:
        return len(self._slabs)

    @property
    def num_rows(self) -> int:
        return len(self._slab_of)

    @property
    def max_tokens_that_fit(self) -> int:
        """The longest row that fits if it is alone."""
        return self._limit_tokens

    def capacity(self, row: int) -> int:
        """Returns how many tokens the row may hold: its slot's, or what it asked for where it can
        be moved to a smaller one."""
        return self._wanted[row] if self._is_parted else self._slab_of[row].capacity

    @property
    def _is_parted(self) -> bool:
        """Tells whether rows that share a slab are parted again where memory is short."""
        return self._rules.max_slabs is not None

    def location(self, row: int) -> Location:
        """Where the row is since the last `settle`."""
        return self._settled[row]

    @property
    def settled(self) -> Mapping[int, Location]:
        """Where all rows are since the last `settle`."""
        return self._settled

    def set_num_tokens(self, row: int, num_tokens: int) -> None:
        """What the row will hold when the step that is planned now has run."""
        assert num_tokens <= self.capacity(row), "a row may not outgrow its slot"
        self._num_tokens[row] = num_tokens

    # ---- ask, then do

    def can_place(self, num_tokens: int, *, tightly: bool = False) -> bool:
        """Returns whether a row fits beside what is cached; with `tightly` in whatever slabs."""
        return self._fits(self._row_bytes(self._capacity_for(num_tokens)), tightly=tightly)

    def could_place(self, num_tokens: int) -> bool:
        """If the prefix cache gave back all it has."""
        return self._could_fit(self._row_bytes(self._capacity_for(num_tokens)))

    def place(self, row: int, num_tokens: int) -> None:
        """Give the row a slot for `num_tokens` tokens; it holds none yet."""
        assert row not in self._slab_of, "the row has a slot"
        assert row not in self._settled, "the row was released in this step"
        capacity = self._capacity_for(num_tokens)
        slab = self._choose_slab(capacity)
        self._wanted[row] = capacity
        self._enter(row, slab)
        self._num_tokens[row] = 0

    def suits(self, row: int, num_tokens: int) -> bool:
        """Whether the row's slot would do for another one of so many tokens."""
        wanted = self._capacity_for(num_tokens)
        return wanted <= self.capacity(row) <= wanted * self._rules.max_shared_ratio

    def can_grow(self, row: int, num_tokens: int, *, tightly: bool = False) -> bool:
        """Returns whether the row may hold more beside what is cached; with `tightly` in whatever
        slabs."""
        return self._fits(self._more_bytes(row, num_tokens), tightly=tightly)

    def could_grow(self, row: int, num_tokens: int) -> bool:
        """If the prefix cache gave back all it has."""
        return self._could_fit(self._more_bytes(row, num_tokens))

    def _more_bytes(self, row: int, num_tokens: int) -> int:
        """Returns what the row needs beyond what it has, to hold so many tokens."""
        wanted = self._row_bytes(self._capacity_for(num_tokens))
        return wanted - self._needed_of(row, self._slab_of[row])

    def grow(self, row: int, num_tokens: int) -> None:
        """Have a slot for `num_tokens` tokens of the row, which is more than it may hold."""
        assert num_tokens > self.capacity(row), "the row fits where it is"
        source = self._slab_of[row]
        self._grow_alone(row, num_tokens)
        if self._is_parted and self._slab_of[row] is not source:
            near_end = (1 - NEAR_END_SHARE) * source.capacity
            neighbours = [r for r in source.rows if self._num_tokens[r] >= near_end]
            for neighbour in neighbours:
                if self.can_grow(neighbour, num_tokens):
                    self._grow_alone(neighbour, num_tokens)

    def _grow_alone(self, row: int, num_tokens: int) -> None:
        source = self._slab_of[row]
        capacity = self._capacity_for(num_tokens)
        if capacity <= source.capacity:
            self._needed_bytes += self._more_bytes(row, num_tokens)
            self._wanted[row] = capacity
            self._is_settled = False
            return
        self._exit(row)
        self._wanted[row] = capacity
        slab = self._choose_slab(capacity)
        if slab.num_slots == 0:
            slab.source_id = source.slab_id
        self._enter(row, slab)

    def release(self, row: int) -> None:
        self._exit(row)
        del self._num_tokens[row]
        del self._wanted[row]

    def settle(self) -> tuple[KVOp, ...]:
        """Choose slots for all rows and say what the runner has to do for it, in order."""
        if self._is_settled:
            return ()
        self._is_settled = True
        self._bring_together()
        sizes = self._choose_sizes()
        moves = self._choose_slots(sizes)
        sources = {move.from_slab for move in moves}
        read = [slab for slab in self._slabs.values() if slab.slab_id in sources]
        unread = [slab for slab in self._slabs.values() if slab.slab_id not in sources]
        ops = reduce(unread, sizes) + enlarge(self._slabs.values(), sizes)
        ops += moves
        ops += reduce(read, sizes)
        self._slabs = {n: slab for n, slab in self._slabs.items() if sizes[n]}
        for slab in self._slabs.values():
            slab.was_left = False
        return tuple(ops)

    # ---- on paper

    def _capacity_for(self, num_tokens: int) -> int:
        if num_tokens > self._limit_tokens:
            return num_tokens
        return min(self._rules.capacity_for(num_tokens), self._limit_tokens)

    def _max_slots(self, slab: Slab) -> int:
        return self._rules.max_slots(slab.num_slots, self._slot_bytes(slab.capacity))

    def _slot_bytes(self, capacity: int) -> int:
        return max(1, self.geometry.slot_bytes(capacity))

    def _row_bytes(self, capacity: int) -> int:
        return self.geometry.row_bytes(capacity)

    def _bytes_of(self, sizes: Mapping[int, int]) -> int:
        """What so many slots per slab, and the state of the rows, take."""
        slots = sum(
            sizes[slab.slab_id] * self.geometry.slot_bytes(slab.capacity)
            for slab in self._slabs.values()
        )
        return slots + self.num_rows * self.geometry.bytes_per_row

    def _fits(self, more_bytes: int, *, tightly: bool = True) -> bool:
        needed_bytes = self._needed_bytes + more_bytes
        if not tightly:
            needed_bytes = self._comfortable_bytes(needed_bytes)
        return needed_bytes <= self.limit_bytes - self.cached_bytes

    def _could_fit(self, more_bytes: int) -> bool:
        return self._needed_bytes + more_bytes <= self.limit_bytes

    def _choose_slab(self, capacity: int) -> Slab:
        """A free slot nearby, else one more slot in a slab of this class, else a new slab."""
        assert self._fits(self._row_bytes(capacity)), "ask before you place or grow"
        most = capacity * self._rules.max_shared_ratio
        free = [
            slab
            for slab in self._slabs.values()
            if slab.has_free_slot
            and capacity <= slab.capacity <= most
            and self._fits(self._row_bytes(slab.capacity))
        ]
        if free:
            return min(free, key=lambda slab: (slab.capacity, -len(slab.rows), slab.slab_id))
        for slab in self._slabs.values():
            if slab.capacity == capacity and len(slab.rows) < self._max_slots(slab):
                return slab
        return self._new_slab(capacity)

    def _bring_together(self) -> None:
        """Puts rows of like length into one slab each where one is to be made, or slots are more
        than fits. Only slabs that are new, or keep all their rows, get rows: what is overwritten
        was read before."""
        max_slabs = self._rules.max_slabs
        held = [slab for slab in self._slabs.values() if slab.rows]
        if max_slabs is None or not held:
            return
        most = self.limit_bytes - self.cached_bytes
        sizes = {slab.slab_id: len(slab.rows) for slab in self._slabs.values()}
        is_over = self._bytes_of(sizes) > most
        if not is_over and all(slab.num_slots for slab in held):
            return
        in_states = self.num_rows * self.geometry.bytes_per_row
        comfortable = min(most, self._comfortable_bytes(self._needed_bytes)) - in_states
        bounds = Bounds(max_slabs, comfortable, most - in_states)
        groups = together(self._wanted, self.geometry.slot_bytes, bounds)
        if len(groups) >= len(held) and not is_over:
            return
        targets = [self._slab_within(capacity, set(rows)) for capacity, rows in groups]
        for (capacity, rows), target in zip(groups, targets, strict=True):
            into = target or self._new_slab(capacity)
            for row in rows:
                if row not in into.rows:
                    self._exit(row)
                    self._enter(row, into)

    def _slab_within(self, capacity: int, rows: set[int]) -> Slab | None:
        """Returns the largest slab of this capacity none of whose rows is missing."""
        found = [
            slab
            for slab in self._slabs.values()
            if slab.capacity == capacity and slab.rows and slab.rows.keys() <= rows
        ]
        return max(found, key=lambda slab: slab.num_slots, default=None)

    def _new_slab(self, capacity: int) -> Slab:
        slab = Slab(self._next_slab_id, capacity)
        self._next_slab_id += 1
        self._slabs[slab.slab_id] = slab
        return slab

    def _needed_of(self, row: int, slab: Slab) -> int:
        """Returns what the row cannot do without: of a larger slot only what it asked for,
        where rows that share slabs can be parted again."""
        return self._row_bytes(self._wanted[row] if self._is_parted else slab.capacity)

    def _enter(self, row: int, slab: Slab) -> None:
        slab.rows[row] = None
        self._slab_of[row] = slab
        self._needed_bytes += self._needed_of(row, slab)
        self._is_settled = False

    def _exit(self, row: int) -> None:
        slab = self._slab_of.pop(row)
        del slab.rows[row]
        slab.was_left = True
        self._needed_bytes -= self._needed_of(row, slab)
        self._is_settled = False

    # ---- settling

    def _choose_sizes(self) -> dict[int, int]:
        """Slots per slab: with room to spare where the limit allows it."""
        sizes = {slab.slab_id: self._comfortable_size(slab) for slab in self._slabs.values()}
        if self._is_parted:
            most = self._comfortable_bytes(self._needed_bytes)
            self._cut_spare(sizes, most, keeps_slots=True)
        excess = self._cut_spare(sizes, self.limit_bytes - self.cached_bytes, keeps_slots=False)
        assert excess <= 0, "the rows alone are over the limit"
        return sizes

    def _cut_spare(self, sizes: dict[int, int], most_bytes: int, *, keeps_slots: bool) -> int:
        """Takes spare slots from the sizes for as long as they hold more, only those that are not
        made yet with `keeps_slots`. Returns by how much they hold more still."""
        excess = self._bytes_of(sizes) - most_bytes
        by_spare = sorted(
            self._slabs.values(), key=lambda slab: -slab.num_spare_tokens(sizes[slab.slab_id])
        )
        for slab in by_spare:
            if excess <= 0:
                break
            size, slot_bytes = sizes[slab.slab_id], self._slot_bytes(slab.capacity)
            least = len(slab.rows)
            if keeps_slots:
                least = max(least, min(size, slab.num_slots))
            cut = min(size - least, -(-excess // slot_bytes))
            sizes[slab.slab_id] -= cut
            excess -= cut * slot_bytes
        return excess

    def _comfortable_size(self, slab: Slab) -> int:
        needed, num_coming = len(slab.rows), self._num_coming(slab)
        if needed > slab.num_slots:
            most = min(self._max_slots(slab), needed + num_coming + self._max_rows - self.num_rows)
            twice = 2 * (slab.num_slots or self._most_slots(slab.capacity))
            return max(needed, min(max(twice, needed + num_coming), most))
        if needed == 0:
            return 0
        needed += num_coming
        is_large = needed <= slab.num_slots // 4 and not self._is_source(slab)
        if is_large and slab.was_left and not self._is_ample:
            return 2 * needed
        return slab.num_slots

    def _num_coming(self, slab: Slab) -> int:
        """Rows that will grow into it, as their neighbour has."""
        source = None if slab.source_id is None else self._slabs.get(slab.source_id)
        return len(source.rows) if source else 0

    def _is_source(self, slab: Slab) -> bool:
        """Whether its rows are about to leave it."""
        return any(other.source_id == slab.slab_id for other in self._slabs.values())

    def _most_slots(self, capacity: int) -> int:
        return max((s.num_slots for s in self._slabs.values() if s.capacity == capacity), default=0)

    def _choose_slots(self, sizes: Mapping[int, int]) -> list[MoveRow]:
        """Into the largest capacities first: rows only ever move to a larger one, so every slot
        that is overwritten has been read before."""
        moves: list[MoveRow] = []
        settled: dict[int, Location] = {}
        for slab in sorted(self._slabs.values(), key=lambda slab: -slab.capacity):
            num_slots = sizes[slab.slab_id] if self._rules.keeps_holes else len(slab.rows)
            for row, slot in slab.slots(num_slots, self._settled):
                settled[row] = Location(slab.slab_id, slot)
                moves += self._move_of(row, settled[row])
        self._settled = settled
        return moves

    def _move_of(self, row: int, to: Location) -> list[MoveRow]:
        before = self._settled.get(row)
        num_tokens = self._num_tokens[row]
        if before is None or before == to or num_tokens == 0:
            return []
        return [MoveRow(before.slab_id, before.slot, to.slab_id, to.slot, num_tokens)]
