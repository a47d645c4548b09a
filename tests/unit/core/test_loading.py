"""Cached tokens beside decoding rows: loaded within the goal of a step, and never computed."""

from __future__ import annotations

import pytest
from scheduler_sim import Simulation

from mlx_lm_server.core.cost_model import CostModel, StepCosts, StepFeatures
from mlx_lm_server.core.plan import StepPlan
from mlx_lm_server.core.prefix_cache import CacheSettings
from mlx_lm_server.core.request import Request
from mlx_lm_server.core.scheduler import SchedulerLimits
from mlx_lm_server.protocol import SamplingParams

BLOCK = 16
LONG = tuple(range(1000, 1000 + 25 * BLOCK))
QUESTION = (5, 6, 7)


def _request(req_id: str, prompt: tuple[int, ...], max_tokens: int = 2) -> Request:
    return Request(req_id, prompt, SamplingParams(max_tokens=max_tokens, seed=0))


def _with_a_cached_prompt(per_copied_token_s: float, *, beside: bool) -> Simulation:
    """Steps take 10 ms, and their goal is 20."""
    costs = StepCosts(0.01, 0.0, 0.0, 0.0, 0.0, per_copied_token_s)
    limits = SchedulerLimits(min_loaded_tokens=4 * BLOCK, itl_goal_s=0.02)
    cache = CacheSettings(block_size=BLOCK, segment_bytes=10 * BLOCK)
    sim = Simulation(limits, cost_model=CostModel(costs), cache=cache)
    sim.cost_model.observe = lambda _features, _step_s: None  # type: ignore[method-assign]
    sim.add(_request("first", LONG))
    sim.run()
    if beside:
        sim.add(_request("decoding", (1, 2, 3), 100))
        for _ in range(3):
            sim.step()
    return sim


def _plans_of_the_next(sim: Simulation) -> list[StepPlan]:
    first = len(sim.plans)
    sim.add(_request("next", LONG + QUESTION))
    while not sim.tokens_of("next"):
        sim.step()
    return sim.plans[first:]


def _copied(plans: list[StepPlan]) -> list[int]:
    return [plan.num_copied_tokens for plan in plans if plan.num_copied_tokens]


def test_beside_decoding_rows_a_long_hit_is_loaded_in_parts():
    sim = _with_a_cached_prompt(per_copied_token_s=0.001, beside=True)
    plans = _plans_of_the_next(sim)
    assert _copied(plans) == [64, 64, 64, 64, 64, 64, 16]
    assert [(c.start, c.end) for plan in plans for c in plan.chunks] == [(400, 403)]
    assert all(plan.decodes for plan in plans)
    [report] = [output.cache for output in sim.outputs["next"] if output.cache]
    assert report.num_cached_tokens == len(LONG)


def test_a_part_is_as_long_as_the_goal_of_a_step_allows():
    sim = _with_a_cached_prompt(per_copied_token_s=0.01 / 200, beside=True)
    assert _copied(_plans_of_the_next(sim)) == [192, 192, 16]


def test_with_nobody_decoding_all_is_loaded_at_once():
    sim = _with_a_cached_prompt(per_copied_token_s=0.001, beside=False)
    assert _copied(_plans_of_the_next(sim)) == [400]


def test_some_who_load_share_what_the_goal_allows():
    sim = _with_a_cached_prompt(per_copied_token_s=0.01 / 200, beside=True)
    first = len(sim.plans)
    for i in range(5):
        sim.add(_request(f"next {i}", (*LONG, i)))
    sim.run()
    assert max(_copied(sim.plans[first:])) <= 200
    for i in range(5):
        [report] = [output.cache for output in sim.outputs[f"next {i}"] if output.cache]
        assert report.num_cached_tokens == len(LONG)


def test_what_is_still_to_be_loaded_is_evicted_last():
    sim = _with_a_cached_prompt(per_copied_token_s=0.001, beside=False)
    sim.add(_request("other", tuple(range(3000, 3000 + len(LONG)))))
    sim.run()
    sim.add(_request("decoding", (1, 2, 3), 100))
    sim.step()
    sim.add(_request("next", LONG + QUESTION))
    for _ in range(3):
        sim.step()
    sim.cache.begin()  # nothing is pinned between two plans
    for _ in range(20):
        sim.cache._store._evict_oldest()
    sim.run()
    [report] = [output.cache for output in sim.outputs["next"] if output.cache]
    assert report.num_cached_tokens == len(LONG)


def test_what_is_evicted_meanwhile_is_computed():
    sim = _with_a_cached_prompt(per_copied_token_s=0.001, beside=True)
    sim.add(_request("next", LONG + QUESTION))
    sim.step()
    sim.cache.begin()  # nothing is pinned between two plans
    while sim.cache._store._evict_oldest():
        pass
    sim.run()
    [report] = [output.cache for output in sim.outputs["next"] if output.cache]
    assert report.num_cached_tokens == 64
    assert len(sim.tokens_of("next")) == 2


@pytest.mark.parametrize("first_s", [1e-3, 2e-5, 5e-6])
def test_the_model_learns_what_copies_cost(first_s: float):
    model = CostModel(StepCosts(0.01, 0.0005, 0.0005, 5e-7, 5e-7, first_s))
    step = StepFeatures(rows=4, kv_tokens=1000)
    for _ in range(60):
        model.observe(step, 0.0125)
        model.observe(step._replace(copied_tokens=1000), 0.0325)
    assert 800 < model.max_copied_tokens(0.02) < 1200
