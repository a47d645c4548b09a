"""What the cache keeps beyond the rows: blocks in the pool, and checkpoints. Decides who goes when
memory is short, and keeps the list of operations that the runner has to execute for it.

Blocks and checkpoints form one LRU list. A chain's tail is touched before its head, so that the
oldest entry is always one that no other depends on, once all parts of a row that leaves have come.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from mlx_lm_server.core.block import Block, Place, State
from mlx_lm_server.core.block_pool import DEFAULT_SEGMENT_BYTES, BlockPool
from mlx_lm_server.core.cache_index import CacheIndex
from mlx_lm_server.core.kv_geometry import KVGeometry
from mlx_lm_server.core.kv_layout import KVLayout
from mlx_lm_server.core.offloads import Offloads
from mlx_lm_server.core.plan import (
    DropState,
    RestoreBlocks,
    RestoreState,
    SaveBlocks,
    SaveOp,
    SaveState,
)
from mlx_lm_server.core.tier import Label, NoTier, Tier

# Checkpoints may take this share of the memory for K and V.
MAX_STATE_SHARE = 0.25
# With less than this share of the memory to spare, what is next to go is offloaded beforehand.
SHORT_SHARE = 0.25
# A cache that is held to a part of what it had may have this share of the memory all the same.
LEAST_HELD_SHARE = 1 / 16


@dataclass(frozen=True, slots=True)
class CacheSettings:
    """`max_blocks` caps the pool; of the last `max_sequences` rows that left, what comes after
    their last full block is kept too."""

    is_on: bool = True
    block_size: int = 16
    max_blocks: int | None = None
    max_sequences: int = 50
    segment_bytes: int = DEFAULT_SEGMENT_BYTES


class CacheStore:
    """Owned by the prefix cache. Shares the memory of the rows' layout."""

    def __init__(
        self,
        settings: CacheSettings,
        layout: KVLayout,
        index: CacheIndex,
        tier: Tier | None = None,
    ) -> None:
        self._settings = settings
        self._layout = layout
        self._index = index
        self._block_bytes = settings.block_size * layout.geometry.full_bytes_per_token
        self._offloads = Offloads(
            tier or NoTier(), settings.block_size, self._block_bytes, layout.location
        )
        self._pool = BlockPool(self._block_bytes, settings.max_blocks, settings.segment_bytes)
        self._lru: OrderedDict[Block | State, None] = OrderedDict()  # the oldest first
        self._states: OrderedDict[State, None] = OrderedDict()  # those of them, in the same order
        self._ends: deque[tuple[Block | State, ...]] = deque()  # of sequences, the oldest first
        self._pinned: set[Block | State] = set()
        self._saves: list[SaveOp] = []
        self._state_bytes = 0
        self._next_state_id = 0
        self._most_bytes: int | None = None  # what it may have, where it is held
        self._held_at_bytes = 0  # what it had when that began
        self.num_evictions = 0

    @property
    def used_bytes(self) -> int:
        return self._pool.used_bytes + self._state_bytes

    @property
    def num_blocks(self) -> int:
        return self._pool.num_used

    @property
    def num_free_places(self) -> int:
        return self._pool.num_free

    def blocks_in(self, num_bytes: int) -> int:
        """As many blocks as so many bytes are, at least one."""
        return max(1, num_bytes // max(1, self._block_bytes))

    @property
    def num_states(self) -> int:
        return len(self._states)

    @property
    def geometry(self) -> KVGeometry:
        return self._layout.geometry

    # ---- a plan is made

    def begin(self) -> None:
        self._saves = []
        self._pinned.clear()
        self._offloads.begin()
        self._offloads.of_due(self._saves)
        if self.is_too_large:
            self._shrink()
        if self._is_short:
            self._offloads.of_oldest(self._lru, self._saves)

    @property
    def _is_short(self) -> bool:
        free = self._pool.num_free * self._block_bytes
        if not self._pool.next_segment_bytes and self._block_bytes:  # the operator's cap
            return free < SHORT_SHARE * self._pool.used_bytes
        return self._layout.spare_bytes + free < SHORT_SHARE * self._layout.limit_bytes

    @property
    def has_offloads_due(self) -> bool:
        return self._offloads.has_due

    @property
    def has_offloads(self) -> bool:
        return self._offloads.has_any

    def offload_all(self) -> None:
        """From the next plan on, the newest first."""
        self._offloads.keep_all(reversed(self._lru))

    def note_filled(self, block: Block) -> None:
        """A row has all tokens of the block by the next plan."""
        self._offloads.note_kept([block])

    @property
    def has_saves(self) -> bool:
        return bool(self._saves)

    def take_saves(self) -> tuple[SaveOp, ...]:
        saves, self._saves = tuple(self._saves), []
        return saves

    def pin(self, entries: Iterable[Block | State]) -> set[Block | State]:
        """Until the plan is made they are not evicted; gives those that were not pinned before."""
        new = set(entries) - self._pinned
        self._pinned |= new
        return new

    def unpin(self, entries: Iterable[Block | State]) -> None:
        self._pinned.difference_update(entries)

    def touch(self, entries: Iterable[Block | State]) -> None:
        """The tail of a chain first."""
        for entry in entries:
            if entry in self._lru:
                self._lru.move_to_end(entry)
            if isinstance(entry, State) and entry in self._states:
                self._states.move_to_end(entry)

    # ---- what comes

    def put_blocks(
        self, slab_id: int, slot: int, blocks: Sequence[tuple[int, Block]], num_tokens: int
    ) -> None:
        """Save blocks of a slot that holds `num_tokens` tokens, each with its number in the slot,
        the head first. Those for which there is no room are forgotten."""
        self.pin(block for _, block in blocks)
        runs: list[tuple[int, list[Place]]] = []
        for number, (index, block) in enumerate(blocks):
            place = self._find_place(block)
            if place is None:
                self.forget(block for _, block in blocks[number:])
                break
            self._lru[block] = None
            if runs and runs[-1][0] + len(runs[-1][1]) == index:
                runs[-1][1].append(place)
            else:
                runs.append((index, [place]))
        for first, places in runs:
            self._saves.append(SaveBlocks(slab_id, slot, first, num_tokens, tuple(places)))
        self._offloads.note_kept(block for _, block in blocks if block.place)

    def restore_block(self, block: Block) -> bool:
        """Put a block in the pool that came back from the tier; False where there is no room."""
        self.pin([block])
        place = self._find_place(block)
        if place is None:
            self.forget([block])
            return False
        self._lru[block] = None
        last = self._saves[-1] if self._saves else None
        if isinstance(last, RestoreBlocks):
            self._saves[-1] = RestoreBlocks((*last.places, place), (*last.names, block.name))
        else:
            self._saves.append(RestoreBlocks((place,), (block.name,)))
        return True

    def _find_place(self, block: Block) -> Place | None:
        while not self._pool.put(block):
            segment_bytes = self._pool.next_segment_bytes
            if segment_bytes and segment_bytes <= self._spare_bytes:
                self._saves.append(self._pool.grow())
                self._account()
            elif not self._evict_oldest():
                return None
        return block.place

    def put_state(
        self, row: int, parent: bytes, tail: tuple[int, ...], num_tokens: int
    ) -> State | None:
        """Save the state of a row; None where there is no room for it."""
        state = self._make_state(parent, tail, num_tokens)
        if state is not None:
            place = self._layout.location(row)
            save = SaveState(state.state_id, row, place.slab_id, place.slot, num_tokens)
            self._saves.append(save)
            self._offloads.note_kept([state])
        return state

    def restore_state(self, label: Label) -> bool:
        """Keep a state that came back from the tier; False where there is no room."""
        state = self._make_state(label.parent, label.token_ids, label.num_tokens)
        if state is not None:
            self.pin([state])
            self._saves.append(RestoreState(state.state_id, label.num_tokens, label.name))
        return state is not None

    def _make_state(self, parent: bytes, tail: tuple[int, ...], num_tokens: int) -> State | None:
        num_bytes = self._layout.geometry.state_bytes(num_tokens)
        most = int(MAX_STATE_SHARE * self._layout.limit_bytes) - num_bytes
        while self._state_bytes > most:
            oldest = next((s for s in self._states if s not in self._pinned), None)
            if oldest is None:
                return None
            self._drop_state(oldest)
        while self._spare_bytes < num_bytes:
            if not self.give_back():
                return None
        state = State(self._next_state_id, parent, tail, num_tokens, num_bytes)
        self._next_state_id += 1
        self._lru[state] = self._states[state] = None
        self._index.add_state(state)
        self._state_bytes += num_bytes
        self._account()
        return state

    def keep_end(self, entries: tuple[Block | State, ...]) -> None:
        """The ends of the last sequences; older ones go."""
        self._ends.append(entries)
        while len(self._ends) > self._settings.max_sequences:
            for entry in self._ends.popleft():
                if entry not in self._lru or any(entry in end for end in self._ends):
                    continue
                self._evict(entry)

    # ---- how much there is

    def hold(self, share: float) -> None:
        """Lets it have at most such a share of what it has, or had at the first such call, unless
        that is very little; 0 lets it have nothing, 1 lets it grow again."""
        if share >= 1:
            self._most_bytes = None
            return
        if self._most_bytes is None:
            self._held_at_bytes = self.used_bytes
        least = int(LEAST_HELD_SHARE * self._layout.limit_bytes) if share > 0 else 0
        self._most_bytes = max(least, int(share * self._held_at_bytes))

    @property
    def is_too_large(self) -> bool:
        return self._most_bytes is not None and self.used_bytes > self._most_bytes

    @property
    def _spare_bytes(self) -> int:
        """Returns how many bytes it may have more."""
        spare = self._layout.spare_bytes_to_cache
        if self._most_bytes is None:
            return spare
        return min(spare, self._most_bytes - self.used_bytes)

    def _shrink(self) -> None:
        """Some of it in each plan, since what is kept may have to move; all of it at once."""
        if self._most_bytes == 0:
            while self._evict_oldest():
                pass
            while self._pool.can_shrink:
                self._saves += self._pool.shrink()
            self._account()
        else:
            self.give_back()

    # ---- what goes

    def give_back(self) -> bool:
        """Evict until some memory is free again; False where nothing is left that may go."""
        while not self._pool.can_shrink:
            entry = self._oldest()
            if entry is None:
                return False
            self._evict(entry)
            if isinstance(entry, State):
                return True
        self._saves += self._pool.shrink()
        self._account()
        return True

    def forget(self, blocks: Iterable[Block]) -> None:
        """Blocks that nobody holds any more."""
        for block in blocks:
            if block.place is None and not block.rows:
                self._offloads.drop(block)
                self._index.remove(block)

    def _oldest(self) -> Block | State | None:
        return next((entry for entry in self._lru if entry not in self._pinned), None)

    def _evict_oldest(self) -> bool:
        entry = self._oldest()
        if entry is not None:
            self._evict(entry)
        return entry is not None

    def _evict(self, entry: Block | State) -> None:
        self.num_evictions += 1
        if isinstance(entry, State):
            self._drop_state(entry)
            return
        self._offloads.before_eviction(entry, self._saves)
        del self._lru[entry]
        self._pool.remove(entry)
        self.forget([entry])

    def _drop_state(self, state: State) -> None:
        self._offloads.before_eviction(state, self._saves)
        self._offloads.drop(state)
        del self._lru[state], self._states[state]
        self._index.remove_state(state)
        self._state_bytes -= state.num_bytes
        self._saves.append(DropState(state.state_id))
        self._account()

    def _account(self) -> None:
        self._layout.cached_bytes = self.used_bytes
