"""What requests leave behind, so that others need not compute it again.

Committing is naming: a block of a running row gets its name when it is full and computed, and from
then on others may copy it from that row. The bytes of rows go to the pool when the last row that
holds them leaves, which may take some steps; what the tier gives back goes there at once. The pool
takes what rows leave free and gives it back when rows need it.

The scheduler makes a plan like this:

    begin()                  checkpoints that came due with the last plan; what goes to the tier
    take_restored()          what came back from the tier
    keep_some(), keep()      rows that leave
    give_back()              memory for rows (by row_room.py)
    find(), use(), take()    rows that go on from a hit; note_admission() and such count it
    computed(request)        what the plan adds to a row
    finish()                 the operations for the runner: saves, loads

Invariants
- Between two calls a block is in the index if and only if it has a place in the pool or a row that
  holds it.
- `block.rows` are exactly the rows whose first `num_named_blocks` blocks it is among.
- Nothing that a plan loads is evicted by the same plan.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple

from mlx_lm_server.core.block import Block, State, chain_name, num_common
from mlx_lm_server.core.cache_index import CacheIndex
from mlx_lm_server.core.cache_reports import CacheKind, CacheReports
from mlx_lm_server.core.cache_store import MAX_STATE_SHARE, CacheSettings, CacheStore
from mlx_lm_server.core.chain import Chain
from mlx_lm_server.core.hit import Hit
from mlx_lm_server.core.kv_geometry import MAX_ROW_TOKENS
from mlx_lm_server.core.kv_layout import KVLayout
from mlx_lm_server.core.plan import CopyTokens, LoadBlocks, LoadOp, LoadState, SaveOp
from mlx_lm_server.core.request import Request
from mlx_lm_server.core.restores import ComputeS, Restores
from mlx_lm_server.core.tier import Label, NoTier, Tier
from mlx_lm_server.protocol import CacheReport

__all__ = ["CacheSettings", "PrefixCache"]

MIN_STATE_INTERVAL = 256


@dataclass(frozen=True, slots=True)
class _Taken:
    """A hit that a request goes on from; `rows[i]` holds `blocks[i]` where the pool does not."""

    request: Request
    hit: Hit
    rows: tuple[int | None, ...]


@dataclass(frozen=True, slots=True)
class CacheNumbers:
    """What the cache holds, and totals since it was made; queries and hits in prompt tokens."""

    used_bytes: int
    num_blocks: int
    num_free_blocks: int
    num_evictions: int
    num_queried_tokens: int
    num_hit_tokens: int
    num_restored_tokens: int


class KeptPart(NamedTuple):
    """Up to which of a row's blocks all were looked at, and how many of them were saved."""

    stop: int
    num_saved: int


class PrefixCache:
    """Owned by the scheduler; shares its layout's memory."""

    def __init__(self, settings: CacheSettings, layout: KVLayout, tier: Tier | None = None) -> None:
        self._settings = settings
        self._size = settings.block_size
        self._layout = layout
        self._has_blocks = settings.is_on and layout.geometry.full_bytes_per_token > 0
        self._has_state = settings.is_on and layout.geometry.has_state
        self._state_interval = _state_interval(layout, self._size)
        self._tier = tier or NoTier()
        self._index = CacheIndex(self._size)
        self._store = CacheStore(settings, layout, self._index, self._tier)
        self._restores = Restores(self._tier, self._index, self._store, self._size)
        self._chains: dict[Request, Chain] = {}
        self._in_row: dict[int, Chain] = {}  # of rows that hold named blocks
        kind = CacheKind(settings.is_on, self._size, self._has_blocks, self._has_state)
        self._reports = CacheReports(kind, self._index, self._in_row)
        self._due_states: list[Chain] = []
        self._taken: list[_Taken] = []

    @property
    def is_on(self) -> bool:
        return self._settings.is_on

    @property
    def num_named_blocks(self) -> int:
        """How many blocks have a name, in rows and in the pool."""
        return len(self._index)

    @property
    def num_waiting(self) -> int:
        """Requests that wait for the tier."""
        return len(self._restores)

    @property
    def has_offloads(self) -> bool:
        """Whether something is meant for the tier, even where it has no room now."""
        return self._store.has_offloads

    @property
    def has_offloads_due(self) -> bool:
        """Whether a step would give something to the tier."""
        return self._store.has_offloads_due

    def offload_all(self) -> None:
        """Gives the tier what only memory has, in the plans that follow."""
        self._store.offload_all()

    @property
    def numbers(self) -> CacheNumbers:
        store, reports = self._store, self._reports
        return CacheNumbers(
            used_bytes=store.used_bytes,
            num_blocks=store.num_blocks,
            num_free_blocks=store.num_free_places,
            num_evictions=store.num_evictions,
            num_queried_tokens=reports.num_queried_tokens,
            num_hit_tokens=reports.num_hit_tokens,
            num_restored_tokens=self._restores.num_restored_tokens,
        )

    # ---- a request comes and goes

    def enter(self, request: Request, compute_s: ComputeS) -> bool:
        """Takes up a request before anything else is asked about it. Returns whether it should
        wait: the tier brings back what it would have to compute."""
        chain = self._chains[request] = Chain.of(request, self._size)
        return self._may_skip(request) and self._restores.begin(chain, compute_s, request.arrival_s)

    def is_waiting(self, request: Request) -> bool:
        """Whether the request waits for the tier."""
        return self._restores.is_waiting(request)

    def end_wait(self, request: Request) -> None:
        """Lets go what is read for a request that was aborted."""
        self._restores.drop(request)

    def forget(self, request: Request) -> None:
        """Lets go what is known of a request that has ended and has no row."""
        self._chains.pop(request, None)

    def report_of(self, request: Request) -> CacheReport | None:
        """Returns what the request found when it got its first row."""
        return self._chains[request].report

    def next_state_point(self, request: Request) -> int | None:
        """Returns where the next chunk of the request has to end at the latest, so that its state
        can be kept there."""
        if not self._has_state:
            return None
        computed, points = request.num_computed_tokens, self._chains[request].state_points
        regular = (computed // self._state_interval + 1) * self._state_interval
        return min([point for point in points if point > computed] + [regular])

    def add_state_point(self, request: Request, num_tokens: int) -> None:
        """Has the state of the request kept after so many tokens."""
        self._chains[request].state_points.add(num_tokens)

    # ---- hits

    def find(self, request: Request) -> Hit | None:
        """How far the request can go on without computing; None where that is less than a block.
        At least one token is left to compute, and none is skipped whose logprobs are wanted."""
        if not self._may_skip(request):
            return None
        chain = self._chains[request]
        hit = Hit(request.num_computed_tokens, request.num_known_tokens - 1)
        if self._has_blocks:
            hit = self._follow_blocks(chain, hit.start, hit.stop)
        if self._has_state:
            hit = self._walk_back(chain, hit)
        return hit if hit.stop - hit.start >= self._size else None

    def _may_skip(self, request: Request) -> bool:
        return self.is_on and request.sampling.prompt_logprobs is None

    def _follow_blocks(self, chain: Chain, start: int, limit: int) -> Hit:
        blocks = self._index.walk(chain, start, limit)
        num_blocks = start // self._size + len(blocks)
        stop = max(start, num_blocks * self._size)
        child, in_child = self._index.nearest_child(chain, num_blocks, limit)
        row, in_row = self._nearest_row(chain, blocks, stop, limit)
        if in_row > in_child:
            return Hit(start, stop + in_row, tuple(blocks), row)
        if child is not None and in_child:
            blocks.append(child)
            stop = max(start, num_blocks * self._size + in_child)
        return Hit(start, stop, tuple(blocks))

    def _nearest_row(
        self, chain: Chain, blocks: Sequence[Block], start: int, limit: int
    ) -> tuple[int | None, int]:
        """Finds a row that goes on like the request in a block that is not full yet."""
        wanted = chain.known_ids(start, min(limit, start + self._size))
        best, most = None, 0
        for row in blocks[-1].rows if blocks else ():
            other = self._in_row[row]
            held = min(other.request.num_held_tokens, start + self._size)
            ids = other.known_ids(start, held)
            num_tokens = num_common(ids, wanted) if other is not chain else 0
            if num_tokens > most:
                best, most = row, num_tokens
        return best, most

    def _walk_back(self, chain: Chain, hit: Hit) -> Hit:
        """Cuts a hit back to the newest checkpoint in it."""
        state = self._index.newest_state(chain, hit.start, hit.stop)
        if state is None:
            return Hit(hit.start, hit.start)
        num_blocks = -(-state.num_tokens // self._size) - hit.start // self._size
        row = hit.row if num_blocks > len(hit.blocks) else None
        return Hit(hit.start, state.num_tokens, hit.blocks[:num_blocks], row, state)

    def use(self, hit: Hit) -> None:
        """Takes note that somebody goes on from the hit, now or step by step."""
        self._store.pin(hit.entries)
        self._store.touch(hit.entries)
        self._tier.use([Label.of(entry).name for entry in hit.entries])

    def take(self, request: Request, hit: Hit) -> None:
        """The request, which has a row, goes on from the hit, or from the part of one, in use."""
        rows = [None if block.place else next(iter(block.rows)) for block in hit.blocks]
        self._taken.append(_Taken(request, hit, tuple(rows)))
        request.num_computed_tokens = hit.stop
        self._name_blocks(self._chains[request])

    def note_admission(
        self, request: Request, hit: Hit | None, recompute_s: float, *, lacks_room: bool = False
    ) -> None:
        """Counts and reports what the request found, when it gets its first row. `lacks_room`: it
        found something that does not fit the memory beside its row."""
        chain = self._chains[request]
        self._reports.note_admission(chain, hit, recompute_s, lacks_room=lacks_room)

    def note_catching_up(
        self, request: Request, hit: Hit, recompute_s: float, *, is_last: bool
    ) -> None:
        """Counts what the request takes over later: from others that computed it meanwhile, or the
        next part of what it found."""
        chain = self._chains[request]
        self._reports.note_catching_up(chain, hit, recompute_s, is_last=is_last)

    # ---- sharing in flight

    def num_shared(self, request: Request, other: Request) -> int:
        """Prompt tokens, in whole blocks, that two requests begin with alike, where these go
        beyond what `request` has; 0 else."""
        mine, theirs = self._chains[request], self._chains[other]
        if not self._may_skip(request) or mine.root != theirs.root:
            return 0
        first = request.num_computed_tokens // self._size
        last = min(request.num_known_tokens - 1, other.prefill_until) // self._size
        if first >= last or not mine.is_like(theirs, first):
            return 0
        low, high = first + 1, last  # the first `low` blocks are equal
        while low < high:
            middle = (low + high + 1) // 2
            if mine.is_like(theirs, middle - 1):
                low = middle
            else:
                high = middle - 1
        return low * self._size

    # ---- a plan is made

    def begin(self) -> None:
        self._store.begin()
        self._taken = []
        for chain in self._due_states:
            if chain.request.row is not None:
                self._store.touch(self._save_state(chain, chain.request.row))
        self._due_states = []

    def take_restored(self, now_s: float) -> list[Request]:
        """Puts in the pool what the tier has read. Returns the requests whose wait is over."""
        return self._restores.take(now_s)

    def computed(self, request: Request) -> None:
        """Takes note that a plan brings the request to its `num_computed_tokens`."""
        chain = self._chains[request]
        self._name_blocks(chain)
        if self._has_state:
            computed = request.num_computed_tokens
            if computed in chain.state_points or computed % self._state_interval == 0:
                self._due_states.append(chain)

    @property
    def has_operations(self) -> bool:
        return bool(self._taken or self._store.has_saves)

    def finish(self) -> tuple[tuple[SaveOp, ...], tuple[LoadOp, ...]]:
        """Once the layout is settled: what the runner does before and after it moves rows."""
        loads = [op for taken in self._taken for op in self._loads_of(taken)]
        return self._store.take_saves(), tuple(loads)

    def _name_blocks(self, chain: Chain) -> None:
        """Let others know the full blocks of the request's row."""
        row, num_blocks = chain.request.row, chain.request.num_held_tokens // self._size
        if not self._has_blocks or row is None or num_blocks == chain.num_named_blocks:
            return
        self._in_row[row] = chain
        for index in range(chain.num_named_blocks, num_blocks):
            ids = chain.known_ids(index * self._size, (index + 1) * self._size)
            name, parent = chain.name_of_block(index), chain.name_of_block(index - 1)
            block = self._index.add(name, parent, ids, (index + 1) * self._size)
            block.rows[row] = None
            self._store.note_filled(block)
        chain.num_named_blocks = num_blocks

    def _loads_of(self, taken: _Taken) -> Iterator[LoadOp]:
        request, hit = taken.request, taken.hit
        assert request.row is not None
        self._layout.set_num_tokens(request.row, hit.stop)
        to = self._layout.location(request.row)
        first = hit.start // self._size
        numbers = range(first, first + len(hit.blocks))
        blocks = list(zip(numbers, hit.blocks, taken.rows, strict=True))
        end = hit.start
        for row, group in groupby(blocks, key=lambda item: item[2]):
            run = list(group)
            start, end = end, min(hit.stop, (run[-1][0] + 1) * self._size)
            if row is None:
                places = tuple(block.place for _, block, _ in run if block.place)
                yield LoadBlocks(to.slab_id, to.slot, start, end, places)
            else:
                yield self._copy(row, request.row, start, end)
        if hit.row is not None:
            yield self._copy(hit.row, request.row, end, hit.stop)
        if hit.state is not None:
            yield LoadState(hit.state.state_id, request.row, to.slab_id, to.slot, hit.stop)

    def _copy(self, from_row: int, to_row: int, start: int, stop: int) -> CopyTokens:
        source, to = self._layout.location(from_row), self._layout.location(to_row)
        return CopyTokens(source.slab_id, source.slot, to.slab_id, to.slot, start, stop)

    # ---- memory for rows

    def pin(self, hit: Hit | None) -> set[Block | State]:
        """Keeps what a request is to go on from until the plan is made. Returns what was not kept
        before."""
        return self._store.pin(hit.entries if hit else ())

    def unpin(self, entries: Iterable[Block | State]) -> None:
        self._store.unpin(entries)

    def give_back(self) -> bool:
        """Evicts until some memory is free again. Returns False where nothing is left that may
        go."""
        return self._store.give_back()

    def blocks_in(self, num_bytes: int) -> int:
        """Returns as many blocks as so many bytes are, at least one."""
        return self._store.blocks_in(num_bytes)

    def hold(self, share: float) -> None:
        """Keeps at most about such a share of what the cache has, or had at the first such call; 1
        lets it grow again."""
        self._store.hold(share)

    @property
    def is_too_large(self) -> bool:
        """Returns whether the next plan makes it smaller."""
        return self._store.is_too_large

    # ---- a row leaves

    def keep_some(self, request: Request, first: int, most: int) -> KeptPart:
        """Save up to `most` of the blocks from number `first` on that only the request's row has,
        which it keeps. Fewer were saved where there are no more, or no room for more beside those
        before them."""
        chain = self._chains[request]
        names = map(chain.name_of_block, range(first))
        self._store.pin(b for name in names if (b := self._index.block(name)) and b.place)
        missing: list[tuple[int, Block]] = []
        stop = first
        while stop < chain.num_named_blocks and len(missing) < most:
            block = self._index.block(chain.name_of_block(stop))
            if block is not None and block.place is None and len(block.rows) == 1:
                missing.append((stop, block))
            stop += 1
        if missing:
            place = self._layout.location(request.held_row)
            self._store.put_blocks(place.slab_id, place.slot, missing, request.num_held_tokens)
        return KeptPart(stop, sum(block.place is not None for _, block in missing))

    def keep(self, request: Request) -> None:
        """Save what the request's row holds and nobody else does; before it gives the row back."""
        row = request.row
        if not self.is_on or row is None:
            return
        chain = self._chains[request]
        self._name_blocks(chain)
        held = [
            (index, block)
            for index in range(chain.num_named_blocks)
            if (block := self._index.block(chain.name_of_block(index))) is not None
        ]
        for _, block in held:
            del block.rows[row]
        self._store.pin(block for _, block in held)
        self._in_row.pop(row, None)
        chain.num_named_blocks = 0
        end = self._end_of(chain)
        place = self._layout.location(row)
        missing = [(i, block) for i, block in [*held, *end] if not (block.place or block.rows)]
        self._store.put_blocks(place.slab_id, place.slot, missing, request.num_held_tokens)
        kept: list[Block | State] = [block for _, block in end if block.place]
        if self._settings.max_sequences:
            kept += self._save_state(chain, row)
        self._store.touch([*kept, *(block for _, block in reversed(held))])
        self._store.keep_end(tuple(kept))

    def _end_of(self, chain: Chain) -> list[tuple[int, Block]]:
        """What comes after the last full block of the row, as a block of its own."""
        num_tokens = chain.request.num_held_tokens
        index = num_tokens // self._size
        tail = chain.known_ids(index * self._size, num_tokens)
        if not (tail and self._has_blocks and self._settings.max_sequences):
            return []
        parent = chain.name_of_block(index - 1)
        name = chain_name(parent, tail)
        return [(index, self._index.add(name, parent, tail, num_tokens))]

    def _save_state(self, chain: Chain, row: int) -> list[State]:
        """Keep the state that the row has now; none where it is ahead of what is known."""
        num_tokens, num_known = chain.request.num_computed_tokens, chain.request.num_known_tokens
        if not self._has_state or not self._size <= num_tokens <= num_known:
            return []
        state = self._index.state_at(chain, num_tokens)
        if state is None:
            num_blocks = num_tokens // self._size
            tail = chain.known_ids(num_blocks * self._size, num_tokens)
            parent = chain.name_of_block(num_blocks - 1)
            state = self._store.put_state(row, parent, tail, num_tokens)
        return [state] if state else []


def _state_interval(layout: KVLayout, block_size: int) -> int:
    """Tokens between checkpoints of a long text, so that these take at most MAX_STATE_SHARE of
    what its tokens take, and at least MIN_STATE_INTERVAL; in whole blocks."""
    geometry = layout.geometry
    interval = MIN_STATE_INTERVAL
    if geometry.full_bytes_per_token:
        affordable = MAX_STATE_SHARE * geometry.full_bytes_per_token
        interval = max(interval, int(geometry.state_bytes(MAX_ROW_TOKENS) / affordable))
    return -(-interval // block_size) * block_size
