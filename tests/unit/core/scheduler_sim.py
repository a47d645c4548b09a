"""A runner of tuples in place of arrays: it executes plans and checks that each is possible.

Every slot holds the token ids that were written to it. The token that a request samples at an
index depends on its seed and that index only, so what it should give is known beforehand.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from mlx_lm_server.core.cost_model import CostModel
from mlx_lm_server.core.kv_geometry import KVGeometry
from mlx_lm_server.core.kv_layout import KVLayout
from mlx_lm_server.core.plan import (
    CopyTokens,
    CreateSegment,
    CreateSlab,
    DropSegment,
    DropSlab,
    DropState,
    JoinedRow,
    KVOp,
    LoadBlocks,
    LoadOp,
    LoadState,
    MoveBlocks,
    MoveRow,
    OffloadBlocks,
    OffloadState,
    OffloadTokens,
    ResizeSlab,
    RestoreBlocks,
    RestoreState,
    RowResult,
    RowWork,
    SaveBlocks,
    SaveOp,
    SaveState,
    StepPlan,
    StepResult,
    decode_plan,
    encode_plan,
)
from mlx_lm_server.core.prefix_cache import CacheSettings, PrefixCache
from mlx_lm_server.core.proposer import Proposer
from mlx_lm_server.core.request import Request
from mlx_lm_server.core.scheduler import Scheduler, SchedulerLimits
from mlx_lm_server.core.slab_rules import SlabRules
from mlx_lm_server.core.tier import Label, NoTier, Tier
from mlx_lm_server.protocol import CacheReport, RequestOutput, SamplingParams

ONE_BYTE = KVGeometry(1)
CACHE_OFF = CacheSettings(is_on=False)
STOP_TOKEN = 7
GARBAGE = -1


def token_at(seed: int, index: int) -> int:
    """What the request with this seed samples as its token `index`; one in 16 is a stop token."""
    return (seed * 2654435761 + index * 40503 + (seed ^ index) * 97) % 1009 % 16


def expected_output(seed: int, num_tokens: int) -> list[int]:
    tokens = []
    for index in range(num_tokens):
        tokens.append(token_at(seed, index))
        if tokens[-1] == STOP_TOKEN:
            break
    return tokens


def make_request(
    req_id: str,
    num_prompt: int,
    max_tokens: int,
    *,
    seed: int = 0,
    priority: int = 0,
    client_key: str = "",
    arrival_s: float = 0.0,
    stops: bool = True,
) -> Request:
    return Request(
        req_id=req_id,
        prompt_ids=tuple(100 + (seed + i) % 900 for i in range(num_prompt)),
        sampling=SamplingParams(
            max_tokens=max_tokens, seed=seed, stop_token_ids=(STOP_TOKEN,) if stops else ()
        ),
        priority=priority,
        client_key=client_key,
        arrival_s=arrival_s,
    )


@dataclass
class SlabStore:
    """Executes KV operations on lists of token ids."""

    slabs: dict[int, list[list[int]]] = field(default_factory=dict)
    capacities: dict[int, int] = field(default_factory=dict)
    num_moves: int = 0

    @property
    def held_tokens(self) -> int:
        return sum(len(slots) * self.capacities[sid] for sid, slots in self.slabs.items())

    def apply(self, ops: tuple[KVOp, ...]) -> None:
        for op in ops:
            self._apply_one(op)

    def _apply_one(self, op: KVOp) -> None:
        match op:
            case CreateSlab(slab_id, num_slots, capacity):
                assert slab_id not in self.capacities, "slab ids are never used again"
                assert num_slots > 0
                self.capacities[slab_id] = capacity
                self.slabs[slab_id] = [[GARBAGE] * capacity for _ in range(num_slots)]
            case ResizeSlab(slab_id, num_slots):
                assert num_slots > 0
                assert num_slots != len(self.slabs[slab_id])
                kept = self.slabs[slab_id][:num_slots]
                capacity = self.capacities[slab_id]
                more = [[GARBAGE] * capacity for _ in range(num_slots - len(kept))]
                self.slabs[slab_id] = kept + more
            case DropSlab(slab_id):
                del self.slabs[slab_id]
            case MoveRow(from_slab, from_slot, to_slab, to_slot, num_tokens):
                assert num_tokens > 0
                source = self.slabs[from_slab][from_slot]
                rest = [GARBAGE] * (self.capacities[to_slab] - num_tokens)
                self.slabs[to_slab][to_slot] = source[:num_tokens] + rest
                self.slabs[from_slab][from_slot] = [GARBAGE] * len(source)
                self.num_moves += 1


class FakeTier(NoTier):
    """A disk that answers some steps later, forgets and refuses at random. A record holds the token
    ids of a block, or all that a state's row had seen."""

    def __init__(self, seed: int, *, writes_through: bool = False, is_flaky: bool = True) -> None:
        self._rng = random.Random(seed)
        self._is_flaky = is_flaky
        self.writes_through = writes_through
        self.records: dict[bytes, tuple[Label, list[int]]] = {}
        self.reads: dict[int, Sequence[Label]] = {}
        self.found: dict[bytes, list[int]] = {}  # by the last `poll`
        self.num_reads = 0
        self.num_refused = 0

    def _happens(self, share: float) -> bool:
        return self._is_flaky and self._rng.random() < share

    def save(self, label: Label, tokens: list[int]) -> None:
        assert label.name not in self.records, "it is there already"
        assert GARBAGE not in tokens
        if label.is_state:
            assert len(tokens) == label.num_tokens
        else:
            assert tuple(tokens) == label.token_ids, "other tokens than the label says"
        self.records[label.name] = (label, list(tokens))

    def has(self, name: bytes) -> bool:
        return name in self.records

    def has_room(self, num_bytes: int) -> bool:
        return not self._happens(0.02)

    def note_refused(self) -> None:
        self.num_refused += 1

    def size_of(self, name: bytes) -> int:
        return 1 << 20

    def fetch(self, labels: Sequence[Label]) -> int:
        assert labels
        self.num_reads += 1
        self.reads[self.num_reads] = labels
        return self.num_reads

    def cancel(self, read: int) -> None:
        self.reads.pop(read, None)

    def poll(self) -> list[tuple[int, int]]:
        self.found = {}
        if self.records and self._happens(0.05):
            del self.records[self._rng.choice(list(self.records))]
        ended = [read for read in self.reads if not self._happens(0.5)]
        return [(read, self._find(self.reads.pop(read))) for read in ended]

    def _find(self, labels: Sequence[Label]) -> int:
        for count, label in enumerate(labels):
            stored = self.records.get(label.name)
            if stored is None or self._happens(0.01):
                return count
            assert stored[0].token_ids == label.token_ids
            self.found[label.name] = stored[1]
        return len(labels)


@dataclass
class PoolStore:
    """Executes the operations of the prefix cache on lists of token ids. A state is the list of
    all tokens that its row had seen."""

    slabs: SlabStore
    block_size: int
    geometry: KVGeometry
    segments: dict[int, list[list[int]]] = field(default_factory=dict)
    states: dict[int, list[int]] = field(default_factory=dict)
    tier: Tier = field(default_factory=NoTier)
    max_guesses: int = 0

    @property
    def held_bytes(self) -> int:
        block_bytes = self.block_size * self.geometry.full_bytes_per_token
        blocks = sum(len(blocks) for blocks in self.segments.values()) * block_bytes
        return blocks + sum(self.geometry.state_bytes(len(seen)) for seen in self.states.values())

    def save(self, ops: tuple[SaveOp, ...], rows: dict[int, _Row]) -> None:
        for op in ops:
            match op:
                case CreateSegment(segment_id, num_blocks):
                    assert num_blocks > 0
                    assert segment_id not in self.segments
                    self.segments[segment_id] = [[] for _ in range(num_blocks)]
                case DropSegment(segment_id):
                    del self.segments[segment_id]
                case MoveBlocks(moves):
                    read = [self.segments[a.segment_id][a.number] for a, _ in moves]
                    for tokens, (_, b) in zip(read, moves, strict=True):
                        self.segments[b.segment_id][b.number] = tokens
                case SaveBlocks(slab_id, slot, first_block, num_tokens, places):
                    tokens = self.slabs.slabs[slab_id][slot][:num_tokens]
                    for number, place in enumerate(places, first_block):
                        start = number * self.block_size
                        block = tokens[start : start + self.block_size]
                        assert block, "there is nothing in the block"
                        assert GARBAGE not in block
                        self.segments[place.segment_id][place.number] = list(block)
                case SaveState(state_id, row, _, _, num_tokens):
                    assert state_id not in self.states
                    # What came right behind a stop token may be taken back, as wrong guesses are.
                    num_ahead = rows[row].num_held - num_tokens
                    assert 0 <= num_ahead <= self.max_guesses, "the state is not where it should be"
                    self.states[state_id] = rows[row].tokens[:num_tokens]
                case DropState(state_id):
                    del self.states[state_id]
                case _:
                    self._offload_or_restore(op)

    def _offload_or_restore(self, op: SaveOp) -> None:
        assert isinstance(self.tier, FakeTier)
        match op:
            case OffloadBlocks(places, labels):
                for place, label in zip(places, labels, strict=True):
                    self.tier.save(label, self.segments[place.segment_id][place.number])
            case OffloadTokens(slab_id, slots, numbers, labels):
                for slot, number, label in zip(slots, numbers, labels, strict=True):
                    start = number * self.block_size
                    block = self.slabs.slabs[slab_id][slot][start : start + self.block_size]
                    assert tuple(block) == label.token_ids
                    self.tier.save(label, block)
            case OffloadState(state_id, label):
                self.tier.save(label, self.states[state_id])
            case RestoreBlocks(places, names):
                for place, name in zip(places, names, strict=True):
                    self.segments[place.segment_id][place.number] = list(self.tier.found[name])
            case RestoreState(state_id, num_tokens, name):
                seen = self.tier.found[name]
                assert len(seen) == num_tokens
                assert state_id not in self.states
                self.states[state_id] = list(seen)

    def load(self, ops: tuple[LoadOp, ...], rows: dict[int, _Row]) -> None:
        for op in ops:
            match op:
                case LoadBlocks(slab_id, slot, start, stop, places):
                    first = start // self.block_size * self.block_size
                    tokens = [t for p in places for t in self.segments[p.segment_id][p.number]]
                    self._write(slab_id, slot, start, tokens[start - first : stop - first], stop)
                case CopyTokens(from_slab, from_slot, to_slab, to_slot, start, stop):
                    tokens = self.slabs.slabs[from_slab][from_slot][start:stop]
                    self._write(to_slab, to_slot, start, tokens, stop)
                case LoadState(state_id, row, _, _, num_tokens):
                    assert self.states[state_id] == rows[row].tokens[:num_tokens]

    def _write(self, slab_id: int, slot: int, start: int, tokens: list[int], stop: int) -> None:
        assert start < stop
        assert len(tokens) == stop - start
        assert GARBAGE not in tokens
        held = self.slabs.slabs[slab_id][slot]
        assert stop <= len(held)
        held[start:stop] = tokens


@dataclass
class _Row:
    joined: JoinedRow
    tokens: list[int]
    num_held: int = 0


class FakeRunner:
    """Executes plans; `execute` gives what `Scheduler.update` is to get for the plan."""

    def __init__(
        self,
        limits: SchedulerLimits,
        limit_tokens: int,
        geometry: KVGeometry = ONE_BYTE,
        block_size: int = 16,
        tier: Tier | None = None,
    ) -> None:
        self.limits = limits
        self.limit_tokens = limit_tokens
        self.geometry = geometry
        self.store = SlabStore()
        tier = tier or NoTier()
        self.pool = PoolStore(self.store, block_size, geometry, {}, {}, tier, limits.max_guesses)
        self.num_computed = 0
        self.max_guesses = limits.max_guesses
        self.num_tried = self.num_accepted = 0
        self.rows: dict[int, _Row] = {}
        self.last_step = 0

    def execute(
        self, plan: StepPlan, row_at: dict[tuple[int, int], int] | None = None
    ) -> StepResult:
        """`row_at` says which row lies in a slot."""
        assert decode_plan(encode_plan(plan)) == plan
        assert plan.step == self.last_step + 1
        self.last_step = plan.step
        self._check_bounds(plan)
        self.pool.save(plan.saves, self.rows)
        for row in plan.left_rows:
            del self.rows[row]
        for joined in plan.joined_rows:
            assert joined.row not in self.rows
            assert joined.row not in plan.left_rows
            assert 0 <= joined.row < self.limits.max_batch_size
            self.rows[joined.row] = _Row(joined, [*joined.prompt_ids, *joined.output_ids])
        self.store.apply(plan.kv_ops)
        self.pool.load(plan.loads, self.rows)
        self._check_loads(plan, row_at or {})
        in_rows = self.held_bytes
        assert in_rows + self.pool.held_bytes <= self.limit_tokens
        return self._decode(plan) | self._read_chunks(plan)

    @property
    def held_bytes(self) -> int:
        slabs = self.store.slabs.items()
        slots = sum(
            len(slots) * self.geometry.slot_bytes(self.store.capacities[sid])
            for sid, slots in slabs
        )
        return slots + len(self.rows) * self.geometry.bytes_per_row

    def _check_loads(self, plan: StepPlan, row_at: dict[tuple[int, int], int]) -> None:
        """A row goes on from what was loaded, in its slot as in its state."""
        stops: dict[int, int] = {}
        for op in plan.loads:
            match op:
                case LoadBlocks(slab_id, slot, start, stop):
                    pass
                case CopyTokens(_, _, slab_id, slot, start, stop):
                    pass
                case LoadState(_, row, _, _, num_tokens):
                    assert stops.setdefault(row, num_tokens) == num_tokens
                    continue
            row = row_at[slab_id, slot]
            assert start == stops.get(row, self.rows[row].num_held)
            stops[row] = stop
        with_state = {op.row for op in plan.loads if isinstance(op, LoadState)}
        for number, stop in stops.items():
            self.rows[number].num_held = stop
            assert not self.geometry.has_state or number in with_state
        for (slab_id, slot), number in row_at.items():
            if number in stops:
                self._check_loaded(self.rows[number], self.store.slabs[slab_id][slot])

    def _check_loaded(self, row: _Row, held: list[int]) -> None:
        if self.geometry.full_bytes_per_token:
            assert held[: row.num_held] == row.tokens[: row.num_held], "other tokens were loaded"
        else:
            held[: row.num_held] = row.tokens[: row.num_held]

    def _check_bounds(self, plan: StepPlan) -> None:
        num_tokens = len(plan.decodes) + plan.num_chunk_tokens
        assert num_tokens <= self.limits.max_num_batched_tokens
        places = [(d.slab_id, d.slot) for d in plan.decodes]
        assert places == sorted(places)
        places += [(p.slab_id, p.slot) for p in plan.chunks]
        assert len(places) == len(set(places))
        prompts = [work for work in plan.chunks if not work.guesses]
        if self.limits.prefill_batch_size is not None:
            assert len(prompts) <= self.limits.prefill_batch_size
        if self.limits.prefill_step_size is not None:
            assert all(p.num_tokens <= self.limits.prefill_step_size for p in prompts)

    def _decode(self, plan: StepPlan) -> dict[int, RowResult]:
        sampled = {}
        for work in plan.decodes:
            row = self.rows[work.row]
            assert work.start == row.num_held == len(row.tokens) - 1
            assert len(row.tokens) > len(row.joined.prompt_ids) + len(row.joined.output_ids)
            assert work.yields == 1
            self._write(work.slab_id, work.slot, row, 1)
            sampled[work.row] = RowResult((self._sample(row),))
        return sampled

    def _read_chunks(self, plan: StepPlan) -> dict[int, RowResult]:
        sampled = {}
        for work in plan.chunks:
            row = self.rows[work.row]
            assert work.known_ids
            assert work.start == row.num_held
            known = work.known_ids[: work.num_tokens - len(work.guesses)]
            assert list(known) == row.tokens[work.start : work.end - len(work.guesses)]
            assert bool(work.yields) == (work.start + len(known) == len(row.tokens))
            if work.guesses:
                sampled[work.row] = RowResult(self._try(work, row))
                continue
            self.num_computed += work.num_tokens
            self._write(work.slab_id, work.slot, row, work.num_tokens)
            if work.yields:
                sampled[work.row] = RowResult((self._sample(row),))
        return sampled

    def _try(self, work: RowWork, row: _Row) -> tuple[int, ...]:
        """Writes all guesses; the row holds those that are right."""
        assert self.max_guesses >= len(work.guesses)
        assert len(work.known_ids) == work.yields
        slot = self.store.slabs[work.slab_id][work.slot]
        assert work.end <= len(slot)
        slot[work.start : work.end] = work.known_ids
        drawn = [self._sample(row)]
        for guess in work.guesses:
            if drawn[-1] != guess:
                break
            drawn.append(self._sample(row))
        row.num_held = work.start + len(drawn)
        assert slot[: row.num_held] == row.tokens[: row.num_held]
        self.num_tried += len(work.guesses)
        self.num_accepted += len(drawn) - 1
        return tuple(drawn)

    def _write(self, slab_id: int, slot: int, row: _Row, num_tokens: int) -> None:
        end = row.num_held + num_tokens
        slot_tokens = self.store.slabs[slab_id][slot]
        assert end <= len(slot_tokens)
        slot_tokens[row.num_held : end] = row.tokens[row.num_held : end]
        row.num_held = end
        assert slot_tokens[:end] == row.tokens[:end], "the row lost or mixed up tokens"

    def _sample(self, row: _Row) -> int:
        index = len(row.tokens) - len(row.joined.prompt_ids)
        token = token_at(row.joined.sampling.seed, index)
        row.tokens.append(token)
        return token


SMALL_SLABS = SlabRules(4096)


class Simulation:
    """An engine loop that reads each step one step late."""

    def __init__(
        self,
        limits: SchedulerLimits,
        limit_tokens: int = 1 << 20,
        cost_model: CostModel | None = None,
        cache: CacheSettings = CACHE_OFF,
        geometry: KVGeometry = ONE_BYTE,
        tier: Tier | None = None,
        proposer: Proposer | None = None,
        rules: SlabRules = SMALL_SLABS,
    ) -> None:
        self.layout = KVLayout(
            geometry,
            limit_bytes=limit_tokens,
            rules=rules,
            max_rows=limits.max_batch_size,
        )
        self.keeps_holes = rules.keeps_holes
        self.cost_model = cost_model or CostModel()
        self.cache = PrefixCache(cache, self.layout, tier)
        self.scheduler = Scheduler(limits, self.layout, self.cost_model, self.cache, proposer)
        self.runner = FakeRunner(limits, limit_tokens, geometry, cache.block_size, tier)
        self.in_flight: deque[tuple[StepPlan, StepResult]] = deque()
        self.outputs: dict[str, list[RequestOutput]] = {}
        self.plans: list[StepPlan] = []
        self.now_s = 0.0

    def add(self, request: Request) -> None:
        self.scheduler.add(request)
        self.outputs[request.req_id] = []

    def abort(self, req_id: str) -> bool:
        output = self.scheduler.abort(req_id)
        if output is not None:
            self.outputs[req_id].append(output)
        return output is not None

    def step(self, *, read_at_once: bool = False) -> StepPlan | None:
        """One turn of the engine: plan, execute, read the step before; or read it first."""
        while self.in_flight and self.scheduler.plans_after_reading:
            self.read()
        plan = self.scheduler.schedule(self.now_s)
        if plan is not None:
            self.plans.append(plan)
            self.in_flight.append((plan, self.runner.execute(plan, self.row_at())))
            self.check_prefixes()
        elif not self.in_flight:
            is_idle = not self.scheduler.num_running + self.scheduler.num_waiting
            assert is_idle or self.scheduler.waits_for_tier, "idle with work waiting"
            self.now_s += 0.001
        keep = 0 if read_at_once or plan is None else 1
        while len(self.in_flight) > keep:
            self.read()
        return plan

    def row_at(self) -> dict[tuple[int, int], int]:
        settled = self.layout.settled.items()
        return {(place.slab_id, place.slot): row for row, place in settled}

    def read(self) -> None:
        plan, result = self.in_flight.popleft()
        self.now_s += 0.01
        for output in self.scheduler.update(plan, result, self.now_s):
            self.outputs[output.req_id].append(output)
        self.scheduler.end_step(plan, 0.01)

    def run(self, max_steps: int = 10_000) -> None:
        """Until nothing is left to do."""
        for _ in range(max_steps):
            is_done = self.step() is None and not self.in_flight
            if is_done and not self.scheduler.waits_for_tier:
                return
        raise AssertionError("the scheduler does not come to an end")

    def check_prefixes(self) -> None:
        """The slots in use are the first ones of their slab, one row in each, but for holes."""
        used: dict[int, list[int]] = {sid: [] for sid in self.runner.store.slabs}
        for row in self.runner.rows:
            place = self.layout.location(row)
            used[place.slab_id].append(place.slot)
        for slots in used.values():
            assert slots, "an empty slab is dropped"
            if not self.keeps_holes:
                assert sorted(slots) == list(range(len(slots)))
        assert self.layout.used_bytes == self.runner.held_bytes
        assert self.layout.cached_bytes == self.runner.pool.held_bytes

    def report_of(self, req_id: str) -> CacheReport:
        """What the request was told it had found."""
        chain = next((c for r, c in self.cache._chains.items() if r.req_id == req_id), None)
        told = [output.cache for output in self.outputs[req_id] if output.cache]
        report = told[0] if told else chain and chain.report
        assert report is not None
        return report

    def tokens_of(self, req_id: str) -> list[int]:
        return [token for output in self.outputs[req_id] for token in output.token_ids]

    def finish_reason(self, req_id: str) -> str:
        reasons = [o.finish_reason for o in self.outputs[req_id] if o.finish_reason]
        assert len(reasons) == 1, f"{req_id} ended {len(reasons)} times"
        assert self.outputs[req_id][-1].finish_reason, "no output comes after the end"
        return reasons[0]
