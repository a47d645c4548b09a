"""Tokens that are tried several at once: what is planned, and what is taken back."""

from __future__ import annotations

import pytest
from scheduler_sim import (
    STOP_TOKEN,
    Simulation,
    expected_output,
    make_request,
    token_at,
)

from mlx_lm_server.core.cost_model import StepFeatures
from mlx_lm_server.core.plan import RowResult, RowWork
from mlx_lm_server.core.prefix_cache import CacheSettings
from mlx_lm_server.core.request import Request
from mlx_lm_server.core.scheduler import SchedulerLimits

LIMITS = SchedulerLimits(max_guesses=4)


class Fixed:
    """Proposes the same tokens each time."""

    def __init__(self, *ids: int) -> None:
        self._ids = ids

    def propose(self, _request: Request, most: int) -> tuple[int, ...]:
        return self._ids[:most]


class Oracle:
    """Proposes what comes."""

    def propose(self, request: Request, most: int) -> tuple[int, ...]:
        first = len(request.output_ids)
        return tuple(token_at(request.sampling.seed, first + i) for i in range(most))


def test_right_guesses_come_many_in_a_step() -> None:
    sim = Simulation(LIMITS, proposer=Oracle())
    sim.add(make_request("a", 10, 21, stops=False))
    sim.run()
    assert sim.tokens_of("a") == [token_at(0, i) for i in range(21)]
    tried = [work.yields for plan in sim.plans for work in plan.chunks if work.guesses]
    assert tried == [5, 5, 5, 5]


def test_wrong_guesses_cost_nothing_but_their_computation() -> None:
    sim = Simulation(LIMITS, proposer=Fixed(99, 98))
    sim.add(make_request("a", 10, 8, stops=False))
    sim.run()
    assert sim.tokens_of("a") == [token_at(0, i) for i in range(8)]
    starts = [work.start for plan in sim.plans for work in plan.chunks if work.guesses]
    assert starts == [10 + i for i in range(6)], "each goes on where the one before failed"
    assert sim.runner.num_accepted == 0


def test_no_more_is_tried_than_the_request_may_get() -> None:
    sim = Simulation(LIMITS, proposer=Fixed(99, 98, 97, 96))
    sim.add(make_request("a", 10, 4, stops=False))
    sim.run()
    tried = [len(work.guesses) for plan in sim.plans for work in plan.chunks if work.guesses]
    assert tried == [2, 1]


def test_guesses_stay_within_the_tokens_of_a_step() -> None:
    limits = SchedulerLimits(max_batch_size=4, max_num_batched_tokens=7, max_guesses=4)
    sim = Simulation(limits, proposer=Fixed(99, 98, 97, 96))
    for name in "abc":
        sim.add(make_request(name, 2, 20, stops=False))
    sim.run()
    assert max(plan.num_tokens for plan in sim.plans) == 7


def test_what_comes_after_a_stop_token_in_one_step_is_dropped() -> None:
    seed = next(s for s in range(500) if len(expected_output(s, 30)) == 4)
    sim = Simulation(LIMITS, proposer=Oracle())
    sim.add(make_request("a", 10, 30, seed=seed))
    sim.run()
    assert sim.tokens_of("a") == expected_output(seed, 30)
    assert sim.tokens_of("a")[-1] == STOP_TOKEN
    assert sim.finish_reason("a") == "stop"
    assert len(sim.outputs["a"]) == 2


def test_logprobs_of_dropped_tokens_are_dropped_too() -> None:
    sim = Simulation(LIMITS, proposer=Fixed(5, 6, 7))
    sim.add(make_request("a", 10, 30))
    sim.step()
    sim.read()
    plan = sim.scheduler.schedule(0.0)
    assert plan is not None
    (work,) = plan.chunks
    scores = [object(), object(), object(), object()]
    given = RowResult((5, STOP_TOKEN, 3, 4), logprobs=scores)  # type: ignore[arg-type]
    [output] = sim.scheduler.update(plan, {work.row: given}, 0.0)
    assert output.token_ids == [5, STOP_TOKEN]
    assert output.logprobs == scores[:2]


@pytest.mark.parametrize("limits", [SchedulerLimits(), SchedulerLimits(max_guesses=0)])
def test_rows_that_cannot_take_back_are_not_tried(limits: SchedulerLimits) -> None:
    sim = Simulation(limits, proposer=Oracle())
    sim.add(make_request("a", 10, 8, stops=False))
    sim.run()
    assert not any(work.guesses for plan in sim.plans for work in plan.chunks)
    assert not sim.scheduler.plans_after_reading


def test_rows_without_guesses_decode_beside_those_that_try() -> None:
    class ForOne(Oracle):
        def propose(self, request: Request, most: int) -> tuple[int, ...]:
            return super().propose(request, most) if request.req_id == "a" else ()

    sim = Simulation(LIMITS, proposer=ForOne())
    for name, seed in (("a", 1), ("b", 2)):
        sim.add(make_request(name, 10, 20, seed=seed, stops=False))
    sim.run()
    both = [plan for plan in sim.plans if plan.decodes and plan.chunks and plan.chunks[0].guesses]
    assert len(both) >= 3
    for name, seed in (("a", 1), ("b", 2)):
        assert sim.tokens_of(name) == [token_at(seed, i) for i in range(20)]


def test_blocks_that_guesses_reached_are_named_only_as_far_as_they_were_right() -> None:
    """Who begins like the answer finds what was computed of it, and nothing that was tried."""
    sim = Simulation(LIMITS, cache=CacheSettings(segment_bytes=300), proposer=Fixed(99, 98, 97))
    sim.add(make_request("a", 30, 40, stops=False))
    sim.run()
    answer = [token_at(0, i) for i in range(40)]
    again = make_request("b", 30, 2, stops=False)
    again.prompt_ids = (*again.prompt_ids, *answer, 5)
    sim.add(again)
    sim.run()
    assert sim.report_of("b").num_cached_tokens == 30 + 40 - 1


def test_the_cost_model_takes_guesses_for_a_chunk_after_their_row() -> None:
    sim = Simulation(LIMITS, proposer=Fixed(1, 2, 3))
    sim.add(make_request("a", 10, 30, stops=False))
    sim.step()
    sim.read()
    plan = sim.scheduler.schedule(0.0)
    assert plan is not None
    assert StepFeatures.of(plan) == StepFeatures(rows=1, kv_tokens=11).with_chunk(11, 3)


def test_work_says_what_of_it_is_only_tried() -> None:
    work = RowWork(0, 0, 0, 7, (5, 8, 9), yields=3)
    assert (work.guesses, work.end, work.num_tokens) == ((8, 9), 10, 3)
    assert RowWork(0, 0, 0, 7, (5, 8, 9)).guesses == ()
    assert RowWork(0, 0, 0, 7).guesses == ()
