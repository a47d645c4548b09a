"""Rows whose requests have ended: who waits for what they leave behind, and who does not."""

from __future__ import annotations

from typing import Any

import pytest
from scheduler_sim import FakeTier, Simulation

from mlx_lm_server.core.plan import CreateSlab, SaveBlocks, StepPlan
from mlx_lm_server.core.prefix_cache import CacheSettings
from mlx_lm_server.core.request import Request
from mlx_lm_server.core.scheduler import SchedulerLimits
from mlx_lm_server.protocol import SamplingParams

BLOCK = 16
LONG = tuple(range(1000, 1000 + 25 * BLOCK))


def _request(req_id: str, prompt: tuple[int, ...], max_tokens: int) -> Request:
    return Request(req_id, prompt, SamplingParams(max_tokens=max_tokens, seed=0))


def _simulation(
    limit_tokens: int = 1 << 16,
    max_blocks: int | None = None,
    tier: FakeTier | None = None,
    **limits: int,
) -> Simulation:
    limits = {"leaving_bytes": 4 * BLOCK, "lookahead_tokens": 0, **limits}
    cache = CacheSettings(block_size=BLOCK, segment_bytes=10 * BLOCK, max_blocks=max_blocks)
    return Simulation(SchedulerLimits(**limits), limit_tokens, cache=cache, tier=tier)


def _beside_a_long_row_that_ends(**settings: Any) -> Simulation:
    sim = _simulation(**settings)
    sim.add(_request("short", (1, 2, 3), 60))
    sim.add(_request("long", LONG, 2))
    while len(sim.tokens_of("long")) < 2:
        sim.step()
    return sim


def _num_saved(plan: StepPlan) -> int:
    return sum(len(op.places) for op in plan.saves if isinstance(op, SaveBlocks))


def _steps_until_it_left(sim: Simulation) -> int:
    first = len(sim.plans)
    while sim.scheduler._departures:
        sim.step()
    return len(sim.plans) - first


def test_a_long_row_leaves_in_parts_beside_others():
    sim = _beside_a_long_row_that_ends()
    _steps_until_it_left(sim)
    saved = [_num_saved(plan) for plan in sim.plans]
    [row] = {
        joined.row for plan in sim.plans for joined in plan.joined_rows if joined.req_id == "long"
    }
    [left] = [plan for plan in sim.plans if row in plan.left_rows]
    assert max(saved) == 4
    assert sum(saved) == 26, "25 blocks, and the end"
    assert _num_saved(left) > 0
    assert all(plan.decodes for plan in sim.plans[saved.index(4) :])


def test_who_begins_alike_goes_on_from_a_row_that_leaves():
    sim = _beside_a_long_row_that_ends()
    sim.add(_request("next", LONG[: 15 * BLOCK], 2))
    sim.run()
    [report] = [output.cache for output in sim.outputs["next"] if output.cache]
    assert report.num_cached_tokens == 15 * BLOCK - 1
    assert report.num_from_rows > 0


def test_a_row_alone_leaves_at_once():
    sim = _simulation()
    sim.add(_request("long", LONG, 2))
    sim.run()
    assert max(_num_saved(plan) for plan in sim.plans) == 26
    assert not sim.scheduler.has_work


def test_rows_leave_at_once_when_the_last_other_one_ends():
    sim = _beside_a_long_row_that_ends()
    sim.step()
    assert sim.scheduler._departures
    sim.abort("short")
    assert sim.scheduler.has_work
    assert _steps_until_it_left(sim) == 1


def test_a_row_leaves_at_once_where_somebody_waits_for_a_row():
    sim = _beside_a_long_row_that_ends(max_batch_size=2)
    sim.add(_request("next", (4, 5, 6), 4))
    assert _steps_until_it_left(sim) == 1


def test_a_row_leaves_at_once_for_one_that_needs_a_slot_like_its_own():
    sim = _beside_a_long_row_that_ends()
    num_plans = len(sim.plans)
    sim.add(_request("next", tuple(range(3000, 3000 + len(LONG))), 2))
    assert _steps_until_it_left(sim) == 1
    assert not [
        op for plan in sim.plans[num_plans:] for op in plan.kv_ops if isinstance(op, CreateSlab)
    ]


def test_a_row_does_not_leave_at_once_for_one_that_fits_elsewhere():
    sim = _beside_a_long_row_that_ends()
    sim.add(_request("next", (4, 5, 6), 4))
    assert _steps_until_it_left(sim) > 3


@pytest.mark.parametrize("num_prompt", [54, 56, 58])
def test_nobody_gives_way_to_a_row_that_grows_for_what_one_that_leaves_still_holds(num_prompt: int):
    sim = _simulation(limit_tokens=750, leaving_bytes=BLOCK)
    sim.add(_request("short", tuple(range(num_prompt)), 40))  # its slot holds 64
    sim.add(_request("long", LONG, 2))
    sim.run()
    assert sim.scheduler.stats().num_preemptions_total == 0
    assert sim.cache._store.num_evictions == 0


@pytest.mark.parametrize("settings", [{"max_blocks": 20}, {"limit_tokens": 896}])
def test_where_not_all_of_a_row_finds_room_its_beginning_is_kept(settings: dict[str, int]):
    sim = _beside_a_long_row_that_ends(**settings)
    _steps_until_it_left(sim)
    sim.abort("short")
    sim.add(_request("next", (*LONG, 7, 8), 2))
    sim.run()
    [report] = [output.cache for output in sim.outputs["next"] if output.cache]
    assert report.num_nearest_tokens >= 16 * BLOCK, "cached, whether or not it fits beside the row"


def test_at_the_end_the_tier_gets_what_rows_that_leave_still_hold():
    tier = FakeTier(0, is_flaky=False)
    sim = _beside_a_long_row_that_ends(tier=tier)
    assert sim.scheduler._departures
    sim.scheduler.abort_all()
    sim.scheduler.offload_all()
    sim.run()
    kept = {label.num_tokens for label, _ in tier.records.values()}
    assert kept >= {(i + 1) * BLOCK for i in range(25)}


def test_a_step_saves_what_the_device_copies_in_a_part_of_it():
    sim = _beside_a_long_row_that_ends(copy_bytes_per_s=8 * BLOCK * 1000)
    _steps_until_it_left(sim)
    assert max(_num_saved(plan) for plan in sim.plans) == 8


def test_a_long_row_of_a_large_model_leaves_within_twenty_steps_of_a_small_gpu():
    """8192 tokens of a 4B model beside steps of 37 ms, as its 4-bit weights take at 68 GB/s; a copy
    reads and writes."""
    row_bytes = 8192 * 36 * 2 * 8 * 128 * 2
    limits = SchedulerLimits(copy_bytes_per_s=68e9 / 4)
    assert limits.leaving_bytes_in(0.037) * 20 >= row_bytes
    assert limits.leaving_bytes_in(0.001) * 20 < row_bytes
    assert SchedulerLimits().leaving_bytes_in(0.037) == 4 << 20
