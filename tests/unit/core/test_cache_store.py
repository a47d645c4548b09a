"""What is kept when memory is short, and what becomes of the rest."""

from __future__ import annotations

import pytest
from scheduler_sim import FakeTier, Simulation, make_request, token_at

from mlx_lm_server.core.cache_store import LEAST_HELD_SHARE, MAX_STATE_SHARE
from mlx_lm_server.core.chain import Chain
from mlx_lm_server.core.kv_geometry import KVGeometry
from mlx_lm_server.core.offloads import MAX_LOOKED_AT, MAX_STEP_ENTRIES
from mlx_lm_server.core.prefix_cache import CacheSettings
from mlx_lm_server.core.scheduler import SchedulerLimits
from mlx_lm_server.core.slab_rules import SlabRules

BLOCK = 16
FULL, HYBRID = KVGeometry(1), KVGeometry(1, bytes_per_row=20)
LIMITS = SchedulerLimits(lookahead_tokens=0)


class TierThatFills(FakeTier):
    """It has room as long as it is not `full`."""

    def __init__(self, *, writes_through: bool) -> None:
        super().__init__(0, writes_through=writes_through, is_flaky=False)
        self.full = False

    def has_room(self, num_bytes: int) -> bool:
        return not self.full


def _simulation(
    limit_tokens: int,
    *,
    tier: FakeTier | None = None,
    geometry: KVGeometry = FULL,
    max_sequences: int = 50,
) -> Simulation:
    cache = CacheSettings(BLOCK, segment_bytes=BLOCK, max_sequences=max_sequences)
    return Simulation(
        LIMITS, limit_tokens, cache=cache, geometry=geometry, tier=tier, rules=SlabRules(1 << 16)
    )


def _run(sim: Simulation, seed: int, num_prompt: int, max_tokens: int = 1) -> None:
    sim.add(make_request(f"r{len(sim.outputs)}", num_prompt, max_tokens, seed=seed, stops=False))
    sim.run()


def test_checkpoints_take_a_share_of_the_memory_and_not_more():
    sim = _simulation(2000, geometry=HYBRID)
    for seed in range(60):
        _run(sim, seed, 2 * BLOCK + 1)
    assert 0 < sim.cache._store.num_states * HYBRID.bytes_per_row <= MAX_STATE_SHARE * 2000


def test_a_checkpoint_that_went_before_the_tier_had_room_is_not_offloaded_later():
    tier = TierThatFills(writes_through=True)
    sim = _simulation(600, geometry=HYBRID, tier=tier)
    tier.full = True
    for seed in range(12):
        _run(sim, seed, 2 * BLOCK + 1)
    tier.full = False
    while sim.scheduler.has_offloads:
        sim.step()
    states = [label for label, _ in tier.records.values() if label.is_state]
    assert len(states) == sim.cache._store.num_states


def test_the_end_that_two_sequences_share_stays_as_long_as_the_newer_one():
    sim = _simulation(1 << 16, max_sequences=2)
    text, other = (1, 2 * BLOCK + 9), (2, 2 * BLOCK + 9)
    for seed, num_prompt in (text, text, other):
        _run(sim, seed, num_prompt)
    request = make_request("again", 2 * BLOCK + 20, 1, seed=1)
    sim.add(request)
    sim.run()
    assert sim.report_of("again").num_cached_tokens == 2 * BLOCK + 9


def _num_stored(tier: FakeTier, sim: Simulation, num_blocks: int) -> int:
    """How many blocks of four texts the tier has, once a row as large as the memory has driven them
    out of it."""
    for seed in range(4):
        _run(sim, seed, num_blocks // 4 * BLOCK)
    assert sim.cache._store.num_blocks == num_blocks
    _run(sim, 500, BLOCK // 2, max_tokens=3)
    _run(sim, 300, sim.layout.limit_bytes - BLOCK)
    names = set()
    for seed in range(4):
        request = make_request("names", num_blocks // 4 * BLOCK, 1, seed=seed)
        chain = Chain.of(request, BLOCK)
        names |= {chain.name_of_block(index) for index in range(num_blocks // 4)}
    return sum(map(tier.has, names))


def test_what_a_large_row_drives_out_goes_to_the_tier():
    tier, num_blocks = TierThatFills(writes_through=False), 2 * MAX_LOOKED_AT
    sim = _simulation(2 * num_blocks * BLOCK, tier=tier)
    assert _num_stored(tier, sim, num_blocks) == num_blocks


def test_where_memory_is_short_the_oldest_go_to_the_tier_before_many_are_driven_out_at_once():
    tier, num_blocks = TierThatFills(writes_through=False), MAX_STEP_ENTRIES + MAX_LOOKED_AT - 4
    sim = _simulation(num_blocks * BLOCK * 13 // 10, tier=tier)
    assert _num_stored(tier, sim, num_blocks) == num_blocks


def _idle(sim: Simulation) -> list[int]:
    """Runs until nothing is left to do. Returns what the cache had after each step."""
    sizes = []
    while sim.scheduler.has_work:
        sim.step(read_at_once=True)
        sizes.append(sim.layout.cached_bytes)
    return sizes


def test_a_cache_that_is_held_to_a_share_gives_the_oldest_back_step_by_step():
    sim = _simulation(4000)
    for seed in range(8):
        _run(sim, seed, 10 * BLOCK)
    had = sim.layout.cached_bytes
    assert had == 8 * 10 * BLOCK
    sim.scheduler.hold_cache(0.5)
    sizes = _idle(sim)
    assert sizes == [had - BLOCK * number for number in range(1, 4 * 10 + 1)]
    for seed, num_cached in ((7, 10 * BLOCK - 1), (0, 0)):
        sim.add(make_request(f"again {seed}", 10 * BLOCK, 1, seed=seed, stops=False))
        sim.run()
        assert sim.report_of(f"again {seed}").num_cached_tokens == num_cached


@pytest.mark.parametrize("geometry", [FULL, HYBRID], ids=["blocks", "checkpoints"])
def test_a_cache_that_is_held_does_not_grow_until_it_may(geometry: KVGeometry):
    sim = _simulation(4000, geometry=geometry)
    for seed in range(8):
        _run(sim, seed, 10 * BLOCK)
    had = sim.layout.cached_bytes
    sim.scheduler.hold_cache(0.75)
    _idle(sim)
    for seed in range(20, 30):
        sim.add(make_request(f"later {seed}", 10 * BLOCK, 1, seed=seed, stops=False))
        assert max(_idle(sim)) <= 0.75 * had, "not for one step"
    sim.scheduler.hold_cache(0.5)
    _idle(sim)
    assert 0.4 * had < sim.layout.cached_bytes <= 0.5 * had, "of what it had at first"
    sim.scheduler.hold_cache(1)
    for seed in range(40, 48):
        _run(sim, seed, 10 * BLOCK)
    assert sim.layout.cached_bytes > 0.75 * had


@pytest.mark.parametrize("geometry", [FULL, HYBRID], ids=["blocks", "checkpoints"])
def test_a_cache_that_may_have_nothing_gives_all_of_it_back_in_one_plan(geometry: KVGeometry):
    sim = _simulation(4000, geometry=geometry)
    for seed in range(8):
        _run(sim, seed, 10 * BLOCK)
    assert sim.layout.cached_bytes > 0
    sim.scheduler.hold_cache(0)
    assert _idle(sim) == [0]
    _run(sim, 1, 10 * BLOCK)
    assert sim.layout.cached_bytes == 0


def test_a_cache_that_is_held_may_have_a_little_all_the_same():
    sim = _simulation(4000)
    sim.scheduler.hold_cache(0.5)
    for seed in range(8):
        _run(sim, seed, 10 * BLOCK)
    assert 0 < sim.layout.cached_bytes <= LEAST_HELD_SHARE * 4000


def test_what_is_given_back_for_others_goes_to_the_tier():
    tier = TierThatFills(writes_through=False)
    sim = _simulation(4000, tier=tier)
    _run(sim, 0, 4 * BLOCK)
    sim.scheduler.hold_cache(0)
    _idle(sim)
    assert len(tier.records) == 4


def test_rows_that_run_keep_what_they_have_while_the_cache_gives_all_back():
    sim = _simulation(4000)
    _run(sim, 0, 10 * BLOCK)
    sim.add(make_request("running", 10 * BLOCK, 40, seed=0, stops=False))
    for _ in range(4):
        sim.step()
    sim.scheduler.hold_cache(0)
    sim.run()
    assert sim.tokens_of("running") == [token_at(0, index) for index in range(40)]
    assert sim.layout.cached_bytes == 0
