"""What hits are told of, and to whom."""

from __future__ import annotations

from collections.abc import Sequence

from scheduler_sim import FakeTier, Simulation, make_request

from mlx_lm_server.core.chain import Chain
from mlx_lm_server.core.cost_model import CostModel, StepCosts
from mlx_lm_server.core.plan import CopyTokens
from mlx_lm_server.core.prefix_cache import CacheSettings
from mlx_lm_server.core.scheduler import SchedulerLimits

BLOCK = 16
SETTINGS = CacheSettings(block_size=BLOCK, segment_bytes=2 * BLOCK)


class TierToldOfUses(FakeTier):
    def __init__(self) -> None:
        super().__init__(0, is_flaky=False)
        self.used: list[bytes] = []

    def use(self, names: Sequence[bytes]) -> None:
        self.used += names


def test_the_tier_is_told_of_what_is_used_from_memory():
    tier = TierToldOfUses()
    sim = Simulation(SchedulerLimits(), cache=SETTINGS, tier=tier)
    for name in ("first", "again"):
        sim.add(make_request(name, 6 * BLOCK + 1, 1))
        sim.run()
    request = make_request("names", 6 * BLOCK + 1, 1)
    chain = Chain.of(request, BLOCK)
    assert set(tier.used) == {chain.name_of_block(index) for index in range(6)}


def test_what_a_request_finds_after_a_preemption_is_no_hit():
    """It takes its prompt from the row of another, a block a step beside those who decode; and
    once more after it had to give its row back."""
    sim = Simulation(
        SchedulerLimits(lookahead_tokens=0, min_loaded_tokens=1),
        limit_tokens=480,
        cost_model=CostModel(StepCosts(per_copied_token_s=1.0)),
        cache=SETTINGS,
    )
    request = make_request("preempted", 180, 30, stops=False)
    sim.add(make_request("alike", 180, 60, stops=False))
    sim.add(make_request("large", 200, 10, seed=500, stops=False))
    sim.add(request)
    while not request.num_preemptions:
        sim.step()
    before = (sim.report_of("preempted").num_cached_tokens, sim.cache.numbers.num_hit_tokens)
    num_plans = len(sim.plans)
    sim.run()
    loads = [op for plan in sim.plans[num_plans:] for op in plan.loads]
    assert sum(isinstance(op, CopyTokens) for op in loads) > 1
    assert (
        sim.report_of("preempted").num_cached_tokens,
        sim.cache.numbers.num_hit_tokens,
    ) == before
