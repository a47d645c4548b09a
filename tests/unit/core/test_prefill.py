from __future__ import annotations

import pytest
from scheduler_sim import make_request

from mlx_lm_server.core.cost_model import CostModel, StepCosts, StepFeatures, prefill_pairs
from mlx_lm_server.core.prefill import PrefillPlan
from mlx_lm_server.core.request import Request
from mlx_lm_server.core.scheduler_limits import SchedulerLimits

# A decode step of 10 ms and a prefill token of 1 ms make the sums easy.
COSTS = StepCosts(0.01, 0.001, 0.0, 0.0, 0.0)
IDLE = StepFeatures()
DECODING = StepFeatures(rows=4, kv_tokens=400)


def _prompts(*sizes: int) -> list[Request]:
    requests = []
    for i, size in enumerate(sizes):
        request = make_request(f"r{i}", size, 10)
        request.arrival_order, request.prefill_until = i, size
        requests.append(request)
    return requests


UNBOUNDED = 10**9


def _shares(limits: SchedulerLimits, decode: StepFeatures, *sizes: int) -> dict[str, int]:
    plan = PrefillPlan(limits, CostModel(COSTS), decode, UNBOUNDED)
    return {request.req_id: n for request, n in plan.share_out(_prompts(*sizes))}


def test_with_nobody_decoding_a_chunk_is_as_long_as_the_budget():
    limits = SchedulerLimits(max_num_batched_tokens=512)
    assert _shares(limits, IDLE, 3000) == {"r0": 512}


def test_whole_prompts_share_a_step_where_they_fit():
    assert _shares(SchedulerLimits(), IDLE, 128, 128, 64) == {"r0": 128, "r1": 128, "r2": 64}


def test_without_prompts_there_is_nothing_to_share():
    assert _shares(SchedulerLimits(), DECODING) == {}


def test_beside_decoders_a_chunk_fills_the_step_up_to_the_goal():
    assert _shares(SchedulerLimits(itl_goal_s=0.05), DECODING, 3000) == {"r0": 40}


def test_the_automatic_goal_is_a_multiple_of_the_step_without_prefill():
    limits = SchedulerLimits(auto_goal_factor=4.0, auto_goal_floor_s=0.0)
    assert _shares(limits, DECODING, 3000) == {"r0": 30}


@pytest.mark.parametrize(("factor", "num_tokens"), [(1.2, 4), (2.0, 8), (4.1, 28), (5.0, 40)])
def test_a_long_prompt_beside_decoders_makes_the_step_whole_tiles(factor, num_tokens):
    limits = SchedulerLimits(auto_goal_factor=factor, auto_goal_floor_s=0.0, token_tile=4)
    without = SchedulerLimits(auto_goal_factor=factor, auto_goal_floor_s=0.0)
    assert _shares(limits, DECODING, 3000) == {"r0": num_tokens}
    assert 0 <= _shares(without, DECODING, 3000)["r0"] - num_tokens < 4


def test_tiles_change_nothing_for_an_explicit_goal_a_short_prompt_or_an_idle_machine():
    explicit = SchedulerLimits(itl_goal_s=0.05, token_tile=64)
    assert _shares(explicit, DECODING, 3000) == {"r0": 40}
    limits = SchedulerLimits(auto_goal_factor=2.0, auto_goal_floor_s=0.0, token_tile=64)
    assert _shares(limits, DECODING, 200) == {"r0": 20}
    assert _shares(limits, IDLE, 3001, 3) == {"r0": 2045, "r1": 3}


def test_the_automatic_goal_has_a_floor():
    limits = SchedulerLimits(auto_goal_factor=1.0, auto_goal_floor_s=0.03)
    assert _shares(limits, DECODING, 3000) == {"r0": 20}


def test_a_crowd_of_prompts_stretches_the_automatic_goal_and_no_explicit_one():
    limits = SchedulerLimits(auto_goal_factor=2.0, auto_goal_floor_s=0.0, short_prompt_tokens=0)
    assert sum(_shares(limits, DECODING, *[500] * 4).values()) == 10
    assert sum(_shares(limits, DECODING, *[500] * 6).values()) == 20
    assert sum(_shares(limits, DECODING, *[500] * 400).values()) == 2 * 20 - 10
    explicit = SchedulerLimits(itl_goal_s=0.05)
    assert sum(_shares(explicit, DECODING, *[500] * 12).values()) == 40


def test_a_short_prompt_may_stretch_the_automatic_goal():
    limits = SchedulerLimits(auto_goal_factor=4.0, short_prompt_factor=1.5)
    assert _shares(limits, DECODING, 200) == {"r0": 50}


def test_a_short_prompt_may_not_stretch_an_explicit_goal():
    assert _shares(SchedulerLimits(itl_goal_s=0.05), DECODING, 200) == {"r0": 40}


def test_a_goal_that_cannot_be_kept_leaves_prefill_a_third_of_the_step():
    assert _shares(SchedulerLimits(itl_goal_s=0.001), DECODING, 3000) == {"r0": 5}


def test_the_last_tokens_of_a_short_prompt_get_no_step_of_their_own():
    limits = SchedulerLimits(itl_goal_s=0.05)
    assert _shares(limits, DECODING, 49) == {"r0": 49}
    assert _shares(limits, DECODING, 51) == {"r0": 40}


def test_the_oldest_prompt_gets_a_quarter_and_the_shortest_go_first():
    limits = SchedulerLimits(itl_goal_s=0.09)
    assert _shares(limits, DECODING, 3000, 2000, 30) == {"r0": 20, "r2": 30, "r1": 30}


def test_what_the_shorter_prompts_leave_goes_to_the_oldest():
    limits = SchedulerLimits(itl_goal_s=0.09)
    assert _shares(limits, DECODING, 3000, 10) == {"r0": 70, "r1": 10}


def test_a_prompt_of_two_tokens_needs_no_minimum():
    assert _shares(SchedulerLimits(itl_goal_s=0.09), DECODING, 3000, 2) == {"r0": 78, "r1": 2}


def test_prompts_for_which_only_crumbs_are_left_wait_for_the_next_step():
    limits = SchedulerLimits(max_num_batched_tokens=102)
    assert _shares(limits, IDLE, 100, 100) == {"r0": 100}


def test_a_higher_priority_comes_before_a_shorter_prompt():
    requests = _prompts(3000, 100, 500)
    requests[2].priority = 1
    plan = PrefillPlan(
        SchedulerLimits(max_num_batched_tokens=400), CostModel(COSTS), IDLE, UNBOUNDED
    )
    shares = plan.share_out([requests[2], requests[0], requests[1]])
    assert [(request.req_id, n) for request, n in shares] == [("r2", 400)]


def test_the_bounds_on_prompts_and_on_tokens_per_prompt_hold():
    limits = SchedulerLimits(prefill_step_size=100, prefill_batch_size=2)
    assert _shares(limits, IDLE, 3000, 2000, 1000) == {"r0": 100, "r2": 100}


def test_decoding_rows_use_up_the_token_budget_first():
    limits = SchedulerLimits(max_batch_size=4, max_num_batched_tokens=10, itl_goal_s=10)
    assert _shares(limits, DECODING, 3000) == {"r0": 6}


def test_a_long_context_gets_a_shorter_chunk():
    costs = StepCosts(0.01, 0.001, 0.0, 0.0, 1e-6)
    (request,) = _prompts(5000)
    request.num_computed_tokens = 3000
    plan = PrefillPlan(SchedulerLimits(itl_goal_s=0.05), CostModel(costs), DECODING, UNBOUNDED)
    assert plan.share_out([request]) == [(request, 10)]


def test_a_long_prompt_beside_decoding_rows_starts_small() -> None:
    plan = PrefillPlan(SchedulerLimits(itl_goal_s=60.0), CostModel(COSTS), DECODING, ramp_tokens=16)
    [(_, num_tokens)] = plan.share_out(_prompts(3000))
    assert num_tokens == 16


def test_a_short_prompt_beside_decoding_rows_does_not() -> None:
    plan = PrefillPlan(SchedulerLimits(itl_goal_s=60.0), CostModel(COSTS), DECODING, ramp_tokens=16)
    [(_, num_tokens)] = plan.share_out(_prompts(128))
    assert num_tokens == 128


def test_chunks_far_from_the_start_attend_to_no_more_than_a_step_may():
    limits = SchedulerLimits(max_num_batched_tokens=512, max_prefill_pairs=512 * 1000)
    [request] = _prompts(60_000)
    sizes = []
    for computed in (0, 512, 8_000, 50_000):
        request.num_computed_tokens = computed
        plan = PrefillPlan(limits, CostModel(COSTS), IDLE, UNBOUNDED)
        [(_, num_tokens)] = plan.share_out([request])
        assert prefill_pairs(computed, num_tokens) <= 512 * 1000
        assert prefill_pairs(computed, num_tokens + 1) > 512 * 1000 or num_tokens == 512
        sizes.append(num_tokens)
    assert sizes[0] == 512
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-1] < 12


def test_two_chunks_share_what_a_step_may_attend_to():
    limits = SchedulerLimits(max_num_batched_tokens=512, max_prefill_pairs=100_000)
    requests = _prompts(9000, 9000)
    for request in requests:
        request.num_computed_tokens = 2000
    plan = PrefillPlan(limits, CostModel(COSTS), IDLE, UNBOUNDED)
    chunks = plan.share_out(requests)
    assert sum(prefill_pairs(2000, num_tokens) for _, num_tokens in chunks) <= 100_000


def test_a_chunk_goes_on_where_even_a_few_tokens_attend_to_too_many():
    limits = SchedulerLimits(max_prefill_pairs=10)
    [request] = _prompts(9000)
    request.num_computed_tokens = 2000
    plan = PrefillPlan(limits, CostModel(COSTS), IDLE, UNBOUNDED)
    assert plan.share_out([request]) == [(request, limits.min_chunk_tokens)]
