"""What requests leave behind, so that others need not compute it again.

Committing is naming: a block of a running row gets its name when it is full and computed, and from
then on others may copy it from that row. Bytes go to the pool only when the last row that holds
them leaves, which may take some steps. The pool takes what rows leave free and gives it back when
rows need it.

One plan is made like this:

    begin()                 checkpoints that came due with the last plan; what goes to the tier
    restores.take()         what came back from the tier
    keep_some, keep         rows that leave
    find, take              rows that go on from a hit
    make_room()             memory for rows
    computed(request)       what the plan adds to a row
    finish()                the operations for the runner: saves, loads

Invariants
- A block is in the index if and only if it has a place in the pool or a row that holds it.
- `block.rows` are exactly the rows whose first `num_named_blocks` blocks it is among.
- Nothing that a plan loads is evicted by the same plan.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple

from msgspec import structs

from mlx_lm_server.core.block import Block, State, chain_name, num_common, root_name
from mlx_lm_server.core.cache_index import CacheIndex
from mlx_lm_server.core.cache_store import MAX_STATE_SHARE, CacheSettings, CacheStore
from mlx_lm_server.core.kv_geometry import MAX_ROW_TOKENS
from mlx_lm_server.core.kv_layout import KVLayout
from mlx_lm_server.core.plan import CopyTokens, LoadBlocks, LoadOp, LoadState, SaveOp
from mlx_lm_server.core.request import Request
from mlx_lm_server.core.restores import ComputeS, Restores
from mlx_lm_server.core.tier import Label, NoTier, Tier
from mlx_lm_server.protocol import CacheReport

__all__ = ["CacheSettings", "Hit", "PrefixCache"]

MIN_STATE_INTERVAL = 256
# How many tokens from where two texts part a report shows.
SHOWN_IDS = 24
# Why no more of a prompt was found.
LACKS_ROOM = "what is cached and the row that would take it do not fit the memory together"
DIFFERS = "the prompt differs there from what is cached"
ENDS = "the text that is cached ends there"


@dataclass(frozen=True, slots=True)
class Hit:
    """Tokens `start` to `stop - 1` of a request that need not be computed: `blocks`, of which the
    first is the one that token `start` is in; after them a row whose request goes on alike; and
    the state there."""

    start: int
    stop: int
    blocks: tuple[Block, ...] = ()
    row: int | None = None
    state: State | None = None

    @property
    def entries(self) -> tuple[Block | State, ...]:
        """What may not be evicted meanwhile, the tail first."""
        blocks = tuple(reversed(self.blocks))
        return blocks if self.state is None else (self.state, *blocks)

    def within(self, num_tokens: int) -> Hit | None:
        """Its first blocks with no more than so many tokens; None where that is not one. All of it
        where a state belongs to it, without which its tokens are of no use."""
        if self.stop - self.start <= num_tokens or self.state is not None:
            return self
        blocks = tuple(b for b in self.blocks if b.num_tokens <= self.start + num_tokens)
        return Hit(self.start, blocks[-1].num_tokens, blocks) if blocks else None

    @property
    def first_block(self) -> Hit:
        """The least that can be taken of it."""
        end = self.blocks[0].num_tokens if self.blocks else self.stop
        return self.within(end - self.start) or self


@dataclass(frozen=True, slots=True)
class _Found:
    """How much of a prompt was found, how much of that in rows, and the row that it ends in where
    that has not filled the block there."""

    num_tokens: int = 0
    num_from_rows: int = 0
    row: int | None = None


@dataclass(frozen=True, slots=True)
class _Taken:
    """A hit that a request goes on from; `rows[i]` holds `blocks[i]` where the pool does not."""

    request: Request
    hit: Hit
    rows: tuple[int | None, ...]


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
        self._index = CacheIndex(self._size)
        self.tier = tier or NoTier()
        self.store = CacheStore(settings, layout, self._index, self.tier)
        self.restores = Restores(self.tier, self._index, self.store, self._size)
        self._request_in: dict[int, Request] = {}  # rows that hold named blocks
        self._due_states: list[Request] = []
        self._taken: list[_Taken] = []
        self.num_queried_tokens = 0
        self.num_hit_tokens = 0

    @property
    def is_on(self) -> bool:
        return self._settings.is_on

    @property
    def num_named_blocks(self) -> int:
        """In rows and in the pool."""
        return len(self._index)

    # ---- a request comes

    def enter(self, request: Request) -> None:
        """Before anything else is asked about the request."""
        request.block_size = self._size
        request.cache_root = root_name(request.cache_salt)
        num_blocks = (len(request.prompt_ids) - 1) // self._size
        request.state_points.add(num_blocks * self._size)

    def restore(self, request: Request, compute_s: ComputeS, now_s: float) -> bool:
        """Whether the request should wait: the tier brings back what it would have to compute."""
        return self._may_skip(request) and self.restores.begin(request, compute_s, now_s)

    def next_state_point(self, request: Request) -> int | None:
        """Where the next chunk of the request has to end at the latest, so that its state can be
        kept there."""
        if not self._has_state:
            return None
        computed = request.num_computed_tokens
        regular = (computed // self._state_interval + 1) * self._state_interval
        return min([point for point in request.state_points if point > computed] + [regular])

    # ---- hits

    def find(self, request: Request) -> Hit | None:
        """How far the request can go on without computing; None where that is less than a block.
        At least one token is left to compute, and none is skipped whose logprobs are wanted."""
        if not self._may_skip(request):
            return None
        hit = Hit(request.num_computed_tokens, request.num_known_tokens - 1)
        if self._has_blocks:
            hit = self._follow_blocks(request, hit.start, hit.stop)
        if self._has_state:
            hit = self._walk_back(request, hit)
        return hit if hit.stop - hit.start >= self._size else None

    def _may_skip(self, request: Request) -> bool:
        return self.is_on and request.sampling.prompt_logprobs is None

    def _follow_blocks(self, request: Request, start: int, limit: int) -> Hit:
        blocks = self._index.walk(request, start, limit)
        num_blocks = start // self._size + len(blocks)
        stop = max(start, num_blocks * self._size)
        child, in_child = self._index.nearest_child(request, num_blocks, limit)
        row, in_row = self._nearest_row(request, blocks, stop, limit)
        if in_row > in_child:
            return Hit(start, stop + in_row, tuple(blocks), row)
        if child is not None and in_child:
            blocks.append(child)
            stop = max(start, num_blocks * self._size + in_child)
        return Hit(start, stop, tuple(blocks))

    def _nearest_row(
        self, request: Request, blocks: Sequence[Block], start: int, limit: int
    ) -> tuple[int | None, int]:
        """A row that goes on like the request in a block that is not full yet."""
        wanted = request.known_ids(start, min(limit, start + self._size))
        best, most = None, 0
        for row in blocks[-1].rows if blocks else ():
            other = self._request_in[row]
            ids = other.known_ids(start, min(other.num_held_tokens, start + self._size))
            num_tokens = num_common(ids, wanted) if other is not request else 0
            if num_tokens > most:
                best, most = row, num_tokens
        return best, most

    def _walk_back(self, request: Request, hit: Hit) -> Hit:
        """To the newest checkpoint."""
        state = self._index.newest_state(request, hit.start, hit.stop)
        if state is None:
            return Hit(hit.start, hit.start)
        num_blocks = -(-state.num_tokens // self._size) - hit.start // self._size
        row = hit.row if num_blocks > len(hit.blocks) else None
        return Hit(hit.start, state.num_tokens, hit.blocks[:num_blocks], row, state)

    def use(self, hit: Hit) -> None:
        """Somebody goes on from it, now or step by step."""
        self.store.pin(hit.entries)
        self.store.touch(hit.entries)
        self.tier.use([Label.of(entry).name for entry in hit.entries])

    def take(self, request: Request, hit: Hit) -> None:
        """The request, which has a row, goes on from the hit, or from the part of one, in use."""
        rows = [None if block.place else next(iter(block.rows)) for block in hit.blocks]
        self._taken.append(_Taken(request, hit, tuple(rows)))
        request.num_computed_tokens = hit.stop
        self._name_blocks(request)

    def note_admission(
        self, request: Request, hit: Hit | None, recompute_s: float, *, lacks_room: bool = False
    ) -> None:
        """Count what the request found and report it; when it gets its first row. `lacks_room`:
        it found something that does not fit the memory beside its row."""
        self.num_queried_tokens += len(request.prompt_ids)
        self.num_hit_tokens += hit.stop if hit else 0
        taken = _Found(hit.stop, self._num_from_rows(hit), hit.row) if hit else _Found()
        request.cache_report = self._report(request, taken, recompute_s, lacks_room=lacks_room)

    def note_catching_up(
        self, request: Request, hit: Hit, recompute_s: float, *, is_last: bool
    ) -> None:
        """Count what the request takes over later: from others that computed it meanwhile, or the
        next part of what it found. Not after a preemption, when what it finds may be its own."""
        report = request.cache_report
        if report is None or request.num_preemptions:
            return
        self.num_hit_tokens += hit.stop - hit.start
        num_cached = report.num_cached_tokens + hit.stop - hit.start
        num_from_rows = report.num_from_rows + self._num_from_rows(hit)
        if num_cached == hit.stop and is_last:
            taken = _Found(num_cached, num_from_rows, hit.row)
            request.cache_report = self._report(request, taken, recompute_s, lacks_room=False)
        else:  # more is to come, or in between are tokens of its own, which are no cached text
            request.cache_report = structs.replace(
                report, num_cached_tokens=num_cached, num_from_rows=num_from_rows
            )

    def _num_from_rows(self, hit: Hit) -> int:
        num_tokens = sum(not block.place for block in hit.blocks) * self._size
        if hit.row is not None:
            num_tokens += hit.stop % self._size
        return min(num_tokens, hit.stop - hit.start)

    def _report(
        self, request: Request, taken: _Found, recompute_s: float, *, lacks_room: bool
    ) -> CacheReport:
        prompt = request.prompt_ids
        nearest, other_ids = self._nearest(request, taken)
        why = self._why_not_all(request, taken.num_tokens, nearest, differs=bool(other_ids))
        return CacheReport(
            num_prompt_tokens=len(prompt),
            num_cached_tokens=taken.num_tokens,
            num_from_rows=taken.num_from_rows,
            num_nearest_tokens=nearest,
            prompt_ids=list(prompt[nearest : nearest + SHOWN_IDS]) if other_ids else [],
            nearest_ids=list(other_ids),
            why=LACKS_ROOM if lacks_room and why else why,
            recompute_s=recompute_s,
        )

    def _nearest(self, request: Request, taken: _Found) -> tuple[int, Sequence[int]]:
        """Up to where the prompt is equal to the nearest cached text, and how that goes on if it
        does so otherwise than the prompt."""
        prompt = request.prompt_ids
        if not self._has_blocks:
            return taken.num_tokens, []
        num_blocks = len(self._index.walk(request, 0, len(prompt)))
        child, in_child = self._index.nearest_child(request, num_blocks, len(prompt))
        nearest = num_blocks * self._size + in_child
        other_ids: Sequence[int] = []
        if taken.num_tokens > nearest:  # in a block that a row has not filled yet
            nearest = taken.num_tokens
            if taken.row is not None:
                other_ids = self._request_in[taken.row].known_ids(nearest, nearest + SHOWN_IDS)
        elif child is not None and nearest:
            other_ids = self._index.ids_from(child, in_child, SHOWN_IDS)
        differs = bool(other_ids) and nearest < len(prompt) and other_ids[0] != prompt[nearest]
        return nearest, other_ids if differs else []

    def _why_not_all(
        self, request: Request, num_cached: int, nearest: int, *, differs: bool
    ) -> str:
        """What kept the rest from being found, where it is not for want of memory."""
        num_prompt, block = len(request.prompt_ids), f"a block ({self._size} tokens)"
        if num_cached >= num_prompt - 1:
            return ""
        if not self.is_on:
            return "the prefix cache is off"
        if request.sampling.prompt_logprobs is not None:
            return "logprobs of the prompt were asked for, so all of it is computed"
        if num_prompt <= self._size:
            return f"the prompt is not longer than {block}, and nothing less is taken up"
        if not self._has_blocks:
            return "no checkpoint of the model's state is kept further on"
        if nearest == 0:
            return "nothing that begins like this is cached"
        why = DIFFERS if differs else ENDS
        if nearest == num_cached:
            return why
        if nearest < self._size:
            return f"{why}, and nothing less than {block} is taken up"
        if self._has_state:
            return "the model keeps state that can be taken up only at checkpoints"
        if nearest - num_cached < self._size:
            return f"{why}, and what is left up to there is less than {block}"
        return "the rest of what is cached was left to later steps, beside others that decode"

    # ---- sharing in flight

    def num_shared(self, request: Request, other: Request) -> int:
        """Prompt tokens, in whole blocks, that two requests begin with alike, where these go
        beyond what `request` has; 0 else."""
        if not self._may_skip(request) or request.cache_root != other.cache_root:
            return 0
        first = request.num_computed_tokens // self._size
        last = min(request.num_known_tokens - 1, other.prefill_until) // self._size
        if first >= last or request.name_of_block(first) != other.name_of_block(first):
            return 0
        low, high = first + 1, last  # the first `low` blocks are equal
        while low < high:
            middle = (low + high + 1) // 2
            if request.name_of_block(middle - 1) == other.name_of_block(middle - 1):
                low = middle
            else:
                high = middle - 1
        return low * self._size

    # ---- a plan is made

    def begin(self) -> None:
        self.store.begin()
        self._taken = []
        for request in self._due_states:
            if request.row is not None:
                self.store.touch(self._save_state(request, request.row))
        self._due_states = []

    def computed(self, request: Request) -> None:
        """The plan brings the request to its `num_computed_tokens`."""
        self._name_blocks(request)
        if self._has_state:
            computed = request.num_computed_tokens
            if computed in request.state_points or computed % self._state_interval == 0:
                self._due_states.append(request)

    @property
    def has_operations(self) -> bool:
        return bool(self._taken or self.store.has_saves)

    def finish(self) -> tuple[tuple[SaveOp, ...], tuple[LoadOp, ...]]:
        """Once the layout is settled: what the runner does before and after it moves rows."""
        loads = [op for taken in self._taken for op in self._loads_of(taken)]
        return self.store.take_saves(), tuple(loads)

    def _name_blocks(self, request: Request) -> None:
        """Let others know the full blocks of the request's row."""
        num_blocks = request.num_held_tokens // self._size
        if not self._has_blocks or request.row is None or num_blocks == request.num_named_blocks:
            return
        self._request_in[request.row] = request
        for index in range(request.num_named_blocks, num_blocks):
            ids = request.known_ids(index * self._size, (index + 1) * self._size)
            name, parent = request.name_of_block(index), request.name_of_block(index - 1)
            block = self._index.add(name, parent, ids, (index + 1) * self._size)
            block.rows[request.row] = None
            self.store.note_filled(block)
        request.num_named_blocks = num_blocks

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

    # ---- a row leaves

    def keep_some(self, request: Request, first: int, most: int) -> KeptPart:
        """Save up to `most` of the blocks from number `first` on that only the request's row has,
        which it keeps. Fewer were saved where there are no more, or no room for more beside those
        before them."""
        names = map(request.name_of_block, range(first))
        self.store.pin(b for name in names if (b := self._index.block(name)) and b.place)
        missing: list[tuple[int, Block]] = []
        stop = first
        while stop < request.num_named_blocks and len(missing) < most:
            block = self._index.block(request.name_of_block(stop))
            if block is not None and block.place is None and len(block.rows) == 1:
                missing.append((stop, block))
            stop += 1
        if missing:
            place = self._layout.location(request.held_row)
            self.store.put_blocks(place.slab_id, place.slot, missing, request.num_held_tokens)
        return KeptPart(stop, sum(block.place is not None for _, block in missing))

    def keep(self, request: Request) -> None:
        """Save what the request's row holds and nobody else does; before it gives the row back."""
        row = request.row
        if not self.is_on or row is None:
            return
        self._name_blocks(request)
        held = [
            (index, block)
            for index in range(request.num_named_blocks)
            if (block := self._index.block(request.name_of_block(index))) is not None
        ]
        for _, block in held:
            del block.rows[row]
        self.store.pin(block for _, block in held)
        self._request_in.pop(row, None)
        request.num_named_blocks = 0
        end = self._end_of(request)
        place = self._layout.location(row)
        missing = [(i, block) for i, block in [*held, *end] if not (block.place or block.rows)]
        self.store.put_blocks(place.slab_id, place.slot, missing, request.num_held_tokens)
        kept: list[Block | State] = [block for _, block in end if block.place]
        if self._settings.max_sequences:
            kept += self._save_state(request, row)
        self.store.touch([*kept, *(block for _, block in reversed(held))])
        self.store.keep_end(tuple(kept))

    def _end_of(self, request: Request) -> list[tuple[int, Block]]:
        """What comes after the last full block of the row, as a block of its own."""
        num_tokens = request.num_held_tokens
        index = num_tokens // self._size
        tail = request.known_ids(index * self._size, num_tokens)
        if not (tail and self._has_blocks and self._settings.max_sequences):
            return []
        parent = request.name_of_block(index - 1)
        name = chain_name(parent, tail)
        return [(index, self._index.add(name, parent, tail, num_tokens))]

    def _save_state(self, request: Request, row: int) -> list[State]:
        """Keep the state that the row has now; none where it is ahead of what is known."""
        num_tokens = request.num_computed_tokens
        if not self._has_state or not self._size <= num_tokens <= request.num_known_tokens:
            return []
        state = self._index.state_at(request, num_tokens)
        if state is None:
            num_blocks = num_tokens // self._size
            tail = request.known_ids(num_blocks * self._size, num_tokens)
            parent = request.name_of_block(num_blocks - 1)
            state = self.store.put_state(row, parent, tail, num_tokens)
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
