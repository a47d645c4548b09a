"""Whatever comes and goes: no request gets another's tokens, and every byte has one account."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scheduler_sim import FakeTier, Simulation, expected_output
from slab_rules import slab_rules
from toy_proposer import ToyProposer

from mlx_lm_server.core.block import Block
from mlx_lm_server.core.cost_model import CostModel, StepCosts
from mlx_lm_server.core.kv_geometry import KVGeometry, RingBytes
from mlx_lm_server.core.prefix_cache import CacheSettings, PrefixCache
from mlx_lm_server.core.request import Request
from mlx_lm_server.core.scheduler import SchedulerLimits
from mlx_lm_server.core.slab_rules import SlabRules
from mlx_lm_server.core.tier import Label
from mlx_lm_server.protocol import SamplingParams

GEOMETRIES = {
    "full": KVGeometry(1),
    "hybrid": KVGeometry(1, bytes_per_row=20),
    "windows": KVGeometry(1, rings=(RingBytes(24, 1),)),
    "recurrent": KVGeometry(0, bytes_per_row=30),
    "windows only": KVGeometry(0, rings=(RingBytes(24, 1),)),
}
slow_ok = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@dataclass(frozen=True)
class Arrival:
    before_step: int
    family: int  # prompts of a family begin alike
    num_shared: int
    num_own: int
    max_tokens: int
    priority: int
    abort_at_step: int | None
    salt: str

    def request(self, number: int) -> Request:
        shared = random.Random(self.family).choices(range(100, 110), k=self.num_shared)
        own = random.Random(1000 + number).choices(range(100, 110), k=self.num_own)
        return Request(
            req_id=f"r{number}",
            prompt_ids=(*shared, *own),
            sampling=SamplingParams(
                max_tokens=self.max_tokens, seed=number % 5, stop_token_ids=(7,)
            ),
            priority=self.priority,
            cache_salt=self.salt,
            message_ends=(self.num_shared,),
        )


arrivals = st.lists(
    st.builds(
        Arrival,
        before_step=st.integers(0, 40),
        family=st.integers(0, 2),
        num_shared=st.integers(0, 200),
        num_own=st.integers(1, 60),
        max_tokens=st.one_of(st.integers(1, 8), st.integers(1, 80)),
        priority=st.integers(-1, 1),
        abort_at_step=st.one_of(st.none(), st.none(), st.integers(0, 60)),
        salt=st.sampled_from(["", "", "", "a"]),
    ),
    min_size=1,
    max_size=16,
)

limits = st.builds(
    SchedulerLimits,
    max_batch_size=st.integers(1, 6),
    max_num_batched_tokens=st.integers(6, 200),
    prefill_step_size=st.one_of(st.none(), st.integers(1, 64)),
    lookahead_tokens=st.sampled_from([0, 16, 256]),
    leaving_bytes=st.sampled_from([0, 40, 1 << 20]),
    min_loaded_tokens=st.sampled_from([1, 20, 256]),
)

caches = st.builds(
    CacheSettings,
    block_size=st.sampled_from([1, 4, 16]),
    max_blocks=st.one_of(st.none(), st.none(), st.integers(0, 20)),
    max_sequences=st.sampled_from([0, 2, 50]),
    segment_bytes=st.sampled_from([40, 64, 300]),
)


@slow_ok
@given(
    arrivals=arrivals,
    limits=limits,
    cache=caches,
    kind=st.sampled_from(sorted(GEOMETRIES)),
    limit_bytes=st.one_of(st.integers(500, 1500), st.just(20_000)),
    rules=slab_rules,
    tier=st.one_of(
        st.none(),
        st.builds(
            FakeTier, st.integers(0, 9), writes_through=st.booleans(), is_flaky=st.booleans()
        ),
    ),
    copied_token_s=st.sampled_from([1e-6, 1e-3, 1.0]),
    guesses=st.booleans(),
    held=st.dictionaries(st.integers(0, 60), st.sampled_from([0.0, 0.25, 0.75, 1.0]), max_size=4),
)
def test_requests_get_their_tokens_whatever_they_share(
    arrivals,
    limits,
    cache,
    kind,
    limit_bytes,
    rules,
    tier,
    copied_token_s,
    guesses,
    held,
):
    if guesses:
        limits = replace(limits, max_guesses=0 if GEOMETRIES[kind].bytes_per_row else 5)
    sim = Simulation(
        limits,
        limit_bytes,
        CostModel(StepCosts(per_copied_token_s=copied_token_s)),
        cache=cache,
        geometry=GEOMETRIES[kind],
        tier=tier,
        proposer=ToyProposer(0.7) if guesses else None,
        rules=rules,
    )
    aborted = set()
    for step in range(61):
        for i, arrival in enumerate(arrivals):
            if arrival.before_step == step:
                sim.add(arrival.request(i))
            if arrival.abort_at_step == step and sim.abort(f"r{i}"):
                aborted.add(f"r{i}")
        if step in held:
            sim.scheduler.hold_cache(held[step])
        sim.step()
        check_references(sim)
    sim.run()
    for i, arrival in enumerate(arrivals):
        request = arrival.request(i)
        most = min(arrival.max_tokens, sim.layout.max_tokens_that_fit - len(request.prompt_ids) + 1)
        expected = expected_output(request.sampling.seed, most)
        tokens = sim.tokens_of(f"r{i}")
        if f"r{i}" in aborted:
            assert tokens == expected[: len(tokens)]
        else:
            assert tokens == expected
    assert not sim.layout.num_rows
    assert sim.layout.cached_bytes == sim.runner.pool.held_bytes == sim.cache._store.used_bytes
    check_references(sim)
    assert not sim.cache._chains, "something is known of requests that have ended"


def check_references(sim: Simulation) -> None:
    """References equal tables, and every named block has its bytes somewhere."""
    cache: PrefixCache = sim.cache
    index = cache._index
    held: dict[bytes, set[int]] = {}
    for row, chain in cache._in_row.items():
        assert chain.request.row == row
        for number in range(chain.num_named_blocks):
            held.setdefault(chain.name_of_block(number), set()).add(row)
    for name, block in index._blocks.items():
        assert set(block.rows) == held.pop(name, set())
        assert block.rows or block.place, "a block without bytes"
        assert (block.place is not None) == (block in cache._store._lru)
    assert not held
    places = [b.place for b in index._blocks.values() if b.place]
    assert len(places) == len(set(places)) == cache._store.num_blocks
    stored = [e for e in cache._store._lru if isinstance(e, Block)]
    assert all(index.block(block.name) is block for block in stored)
    for entry in cache._store._offloads._due:
        is_there = isinstance(entry, Block) and index.block(entry.name) is entry
        assert is_there or entry in cache._store._states, "kept for what is gone"


@pytest.mark.parametrize("writes_through", [None, False, True])
@pytest.mark.parametrize("kind", sorted(GEOMETRIES))
def test_memory_stays_within_its_account_over_ten_thousand_steps(kind, writes_through):
    rng = random.Random(3)
    cache = CacheSettings(segment_bytes=128)
    tier = None if writes_through is None else FakeTier(3, writes_through=writes_through)
    sim = Simulation(
        SchedulerLimits(
            max_batch_size=8, max_num_batched_tokens=256, leaving_bytes=50, min_loaded_tokens=30
        ),
        6000,
        CostModel(StepCosts(per_copied_token_s=1e-3)),
        cache=cache,
        geometry=GEOMETRIES[kind],
        tier=tier,
        rules=SlabRules(512),
    )
    number = 0
    for step in range(10_000):
        if sim.scheduler.num_waiting < 4 and rng.random() < 0.3:
            arrival = Arrival(
                0, rng.randrange(6), rng.randrange(400), rng.randrange(1, 60),
                rng.randrange(1, 60), 0, None, "",
            )  # fmt: skip
            sim.add(arrival.request(number))
            number += 1
        if rng.random() < 0.02:
            sim.abort(f"r{rng.randrange(number + 1)}")
        sim.step()  # checks the account at each step
        if step % 500 == 0:
            check_references(sim)
    sim.run()
    assert sim.cache.numbers.num_hit_tokens > 0.2 * sim.cache.numbers.num_queried_tokens
    assert number > 500
    if tier is not None:
        assert sim.cache._restores.num_restored > 100
        check_end(sim, tier)


def check_end(sim: Simulation, tier: FakeTier) -> None:
    """Nobody waits, nothing is being read, and at the end the tier has all that memory has."""
    restores = sim.cache._restores
    assert not len(restores)
    tier._is_flaky = False
    for _ in range(10):
        sim.step()
    assert not restores._reading
    assert not restores._restore_of
    sim.scheduler.offload_all()
    while sim.scheduler.has_offloads:
        sim.step()
    for entry in sim.cache._store._lru:
        assert tier.has(Label.of(entry).name)
