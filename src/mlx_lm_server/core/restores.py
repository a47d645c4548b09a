"""Brings back from the tier what a request can go on from, while it waits for its turn.

    begin(request)   reads what the tier has beyond what is in memory, if that beats computing it
    take()           what has been read goes to the pool; gives the requests that need not wait more

A read is done in parts, so that neither memory outside the account nor the work of a step grows
with the prefix; the next parts are on their way while one is put in place. Requests that need what
is being read already wait for that. Nobody waits longer than computing would take: after that, or
where a part came back short, the request goes on with what there is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from mlx_lm_server.core.block import Block, chain_name
from mlx_lm_server.core.cache_index import CacheIndex
from mlx_lm_server.core.cache_store import CacheStore
from mlx_lm_server.core.chain import Chain
from mlx_lm_server.core.request import Request
from mlx_lm_server.core.tier import Label, Tier

# Of one part; at least one record.
MAX_PART_BYTES, MAX_PART_RECORDS = 4 << 20, 64
PARTS_IN_FLIGHT = 3
# Checkpoints at any token are looked for in so many blocks before the end of what is stored;
# further back only at the ends of blocks and messages.
NUM_SEARCHED_BLOCKS = 64
# A read that takes longer than this and than computing is given up.
MIN_WAIT_S = 0.3

# How long the tokens from the first to the second number take to compute.
ComputeS = Callable[[int, int], float]


@dataclass(slots=True, eq=False)
class _Restore:
    """`in_flight` are the parts that are being read, by their reads; `rest` comes after them;
    `blocks` are those that came."""

    rest: list[Label]
    in_flight: dict[int, Sequence[Label]] = field(default_factory=dict)
    waiting: dict[Request, float] = field(default_factory=dict)  # until when
    blocks: list[Block] = field(default_factory=list)


class Restores:
    """Owned by the prefix cache."""

    def __init__(self, tier: Tier, index: CacheIndex, store: CacheStore, block_size: int) -> None:
        self._tier = tier
        self._index = index
        self._store = store
        self._size = block_size
        geometry = store.geometry
        self._has_blocks = geometry.full_bytes_per_token > 0
        self._has_state = geometry.has_state
        self._reading: dict[int, _Restore] = {}
        self._restore_of: dict[bytes, _Restore] = {}  # by the names of what is to come
        self._waits_for: dict[Request, _Restore] = {}
        self.num_restored_tokens = 0  # in blocks
        self.num_restored = 0  # blocks and states

    def __len__(self) -> int:
        """Requests that wait."""
        return len(self._waits_for)

    # ---- a request comes and goes

    def begin(self, chain: Chain, compute_s: ComputeS, now_s: float) -> bool:
        """Whether the request should wait for what is being read for it."""
        self._tier.look()
        start, stop, missing = self._missing(chain)
        if not missing or stop - start < self._size:
            return False
        would_take_s = compute_s(start, stop)
        restore = next(
            (self._restore_of[x.name] for x in missing if x.name in self._restore_of), None
        )
        if restore is None:
            if self._tier.read_forecast_s(label.name for label in missing) >= would_take_s:
                return False
            restore = self._start(missing)
        request = chain.request
        restore.waiting[request] = now_s + max(MIN_WAIT_S, would_take_s)
        self._waits_for[request] = restore
        return True

    def is_waiting(self, request: Request) -> bool:
        return request in self._waits_for

    def drop(self, request: Request) -> None:
        """It was aborted; nothing is read for nobody."""
        restore = self._waits_for.pop(request)
        del restore.waiting[request]
        if not restore.waiting:
            self._end(restore)

    # ---- a plan is made

    def take(self, now_s: float) -> list[Request]:
        """Put in the pool what has been read. Gives the requests whose wait is over."""
        released: list[Request] = []
        for read, num_found in self._tier.poll():
            restore = self._reading.pop(read, None)
            if restore is not None:
                released += self._take_part(restore, restore.in_flight.pop(read), num_found)
        for request, restore in list(self._waits_for.items()):
            if restore.waiting[request] <= now_s:
                del restore.waiting[request], self._waits_for[request]
                released.append(request)
        return released

    def _start(self, labels: list[Label]) -> _Restore:
        restore = _Restore(labels)
        self._restore_of.update((label.name, restore) for label in labels)
        self._fetch(restore)
        return restore

    def _fetch(self, restore: _Restore) -> None:
        while restore.rest and len(restore.in_flight) < PARTS_IN_FLIGHT:
            part, restore.rest = self._split(restore.rest)
            read = self._tier.fetch(part)
            restore.in_flight[read] = part
            self._reading[read] = restore

    def _split(self, labels: list[Label]) -> tuple[list[Label], list[Label]]:
        num_bytes = 0
        for count, label in enumerate(labels):
            num_bytes += self._tier.size_of(label.name)
            if count and (num_bytes > MAX_PART_BYTES or count >= MAX_PART_RECORDS):
                return labels[:count], labels[count:]
        return labels, []

    def _take_part(self, restore: _Restore, part: Sequence[Label], num_found: int) -> list[Request]:
        is_whole = num_found == len(part)
        if is_whole:
            self._fetch(restore)
        if self._put(restore, part[:num_found]) and is_whole and restore.in_flight:
            return []
        self._end(restore)
        # What lies at the tail goes first again.
        self._store.touch(reversed(restore.blocks))
        return self._release(restore)

    def _put(self, restore: _Restore, labels: Sequence[Label]) -> bool:
        """Whether all that came has found room."""
        for label in labels:
            put = self._put_state if label.is_state else self._put_block
            if not put(restore, label):
                return False
        return True

    def _put_state(self, _: _Restore, label: Label) -> bool:
        if self._index.has_state(label.parent, label.token_ids):
            return True
        self.num_restored += 1
        return self._store.restore_state(label)

    def _put_block(self, restore: _Restore, label: Label) -> bool:
        if self._index.block(label.name) is not None:
            return True
        block = self._index.add(label.name, label.parent, label.token_ids, label.num_tokens)
        if not self._store.restore_block(block):
            return False
        restore.blocks.append(block)
        self.num_restored += 1
        self.num_restored_tokens += len(label.token_ids)
        return True

    def _end(self, restore: _Restore) -> None:
        for read in restore.in_flight:
            self._tier.cancel(read)
            del self._reading[read]
        for name in [n for n, other in self._restore_of.items() if other is restore]:
            del self._restore_of[name]

    def _release(self, restore: _Restore) -> list[Request]:
        released = list(restore.waiting)
        for request in released:
            del self._waits_for[request]
        restore.waiting.clear()
        return released

    # ---- what would help

    def _missing(self, chain: Chain) -> tuple[int, int, list[Label]]:
        """From where to where, in tokens, the tier carries the request, and what has to be read
        for it: the first what makes the others useless."""
        limit = chain.request.num_known_tokens - 1
        start, stop = 0, limit
        missing: list[Label] = []
        if self._has_blocks:
            start, stop, missing = self._missing_blocks(chain)
        if self._has_state:
            here = self._index.newest_state(chain, 0, start if self._has_blocks else limit)
            start = here.num_tokens if here else 0
            state = self._newest_state(chain, min(stop, limit), start)
            if state is None:
                return 0, 0, []
            stop = state.num_tokens
            missing = [x for x in missing if x.num_tokens - len(x.token_ids) < stop]
            if not self._index.has_state(state.parent, state.token_ids):
                missing = [state, *missing]
        return start, min(stop, limit), missing

    def _missing_blocks(self, chain: Chain) -> tuple[int, int, list[Label]]:
        """How far memory carries the request, how far memory and tier together, and what of that
        is in the tier only."""
        known, size = chain.request.num_known_tokens, self._size
        missing: list[Label] = []
        start = None
        for index in range(known // size):
            name = chain.name_of_block(index)
            if self._index.block(name) is None:
                if start is None:
                    start = index * size
                if not self._tier.has(name):
                    break
                parent, ids = chain.name_of_block(index - 1), self._ids(chain, index)
                missing.append(Label(name, parent, ids, (index + 1) * size))
        else:
            index = known // size
        stop = index * size
        end = self._end_after(chain, index)
        if end is not None:
            stop = end.num_tokens
            if self._index.block(end.name) is None:
                missing.append(end)
        return stop if start is None else start, stop, missing

    def _ids(self, chain: Chain, index: int) -> tuple[int, ...]:
        return chain.known_ids(index * self._size, (index + 1) * self._size)

    def _end_after(self, chain: Chain, num_blocks: int) -> Label | None:
        """The longest end of a sequence that goes on like the request for less than a block."""
        parent, ids = chain.name_of_block(num_blocks - 1), self._ids(chain, num_blocks)
        for length in range(min(len(ids), self._size - 1), 0, -1):
            name = chain_name(parent, ids[:length])
            if self._tier.has(name) or self._index.block(name) is not None:
                num_tokens = num_blocks * self._size + length
                return Label(name, parent, ids[:length], num_tokens)
        return None

    def _newest_state(self, chain: Chain, stop: int, start: int) -> Label | None:
        """The checkpoint of most tokens of the request, in memory or in the tier."""
        for num_tokens in self._searched(chain, stop):
            if num_tokens <= start:
                return None
            num_blocks = num_tokens // self._size
            tail = chain.known_ids(num_blocks * self._size, num_tokens)
            label = Label.of_state(chain.name_of_block(num_blocks - 1), tail, num_tokens)
            if self._tier.has(label.name) or self._index.has_state(label.parent, tail):
                return label
        return None

    def _searched(self, chain: Chain, stop: int) -> Iterator[int]:
        densely = max(0, stop - NUM_SEARCHED_BLOCKS * self._size)
        yield from range(stop, densely, -1)
        ends: Iterable[int] = range(self._size, densely + 1, self._size)
        points = {point for point in chain.state_points if 0 < point <= densely}
        yield from sorted(points.union(ends), reverse=True)
