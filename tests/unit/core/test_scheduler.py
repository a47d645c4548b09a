from __future__ import annotations

import pytest
from scheduler_sim import STOP_TOKEN, Simulation, expected_output, make_request, token_at

from mlx_lm_server.core.plan import CreateSlab, MoveRow, ResizeSlab, RowResult, StepPlan
from mlx_lm_server.core.request import Request, RequestStatus
from mlx_lm_server.core.scheduler import SchedulerLimits
from mlx_lm_server.core.slab_rules import SlabRules
from mlx_lm_server.errors import InvalidRequestError, RequestTooLargeError
from mlx_lm_server.protocol import AddRequest, RequestOutput


def _sim(limit_tokens: int = 100_000, **limits: int) -> Simulation:
    return Simulation(SchedulerLimits(**limits), limit_tokens)


def _endless(req_id: str, num_prompt: int, max_tokens: int, **kwargs: int) -> Request:
    return make_request(req_id, num_prompt, max_tokens, stops=False, **kwargs)


def _stopping_seed(num_tokens: int) -> int:
    """A seed whose request stops with exactly so many tokens."""
    return next(s for s in range(10_000) if len(expected_output(s, 50)) == num_tokens)


def _step(sim: Simulation) -> StepPlan:
    plan = sim.step()
    assert plan is not None
    return plan


# ---- one request


def test_without_requests_there_is_nothing_to_do():
    sim = _sim()
    assert sim.step() is None
    assert not sim.scheduler.num_running + sim.scheduler.num_waiting


def test_the_first_step_joins_the_row_and_prefills_the_prompt():
    sim = _sim()
    sim.add(_endless("a", 10, 3))
    plan = _step(sim)
    assert [joined.req_id for joined in plan.joined_rows] == ["a"]
    (chunk,) = plan.chunks
    assert (chunk.row, chunk.start, chunk.num_tokens, chunk.yields) == (0, 0, 10, 1)


def test_a_token_is_decoded_before_it_is_read():
    sim = _sim()
    sim.add(_endless("a", 10, 3))
    _step(sim)
    assert sim.tokens_of("a") == []
    (decode,) = _step(sim).decodes
    assert decode.start == 10
    assert len(sim.tokens_of("a")) == 1


def test_a_row_is_not_planned_past_max_tokens_and_leaves_with_the_next_plan():
    sim = _sim()
    sim.add(_endless("a", 10, 3))
    sim.run()
    assert [len(plan.sampling) for plan in sim.plans] == [1, 1, 1, 0]
    assert sim.plans[-1].left_rows == (0,)
    assert sim.tokens_of("a") == [token_at(0, i) for i in range(3)]
    assert sim.finish_reason("a") == "length"


def test_first_and_last_tokens_are_awaited_and_those_between_are_not():
    sim = _sim()
    sim.add(_endless("a", 10, 4))
    found = []
    for _ in range(4):
        plan = sim.scheduler.schedule(0.0)
        assert plan is not None
        (work,) = plan.sampling
        found.append(work.is_awaited)
        sim.scheduler.update(plan, {work.row: RowResult((5,))}, 0.0)
        sim.scheduler.end_step(plan, None)
    assert found == [True, False, False, True]


def test_one_token_needs_one_step():
    sim = _sim()
    sim.add(_endless("a", 10, 1))
    sim.run()
    assert [len(plan.sampling) for plan in sim.plans] == [1, 0]


def test_a_stop_token_ends_the_request_and_the_token_after_it_is_dropped():
    sim = _sim()
    sim.add(make_request("a", 10, 50, seed=_stopping_seed(4)))
    sim.run()
    assert sim.tokens_of("a")[-1] == STOP_TOKEN
    assert len(sim.tokens_of("a")) == 4
    assert sim.finish_reason("a") == "stop"
    assert sum(len(plan.sampling) for plan in sim.plans) == 5


def test_a_stop_token_at_max_tokens_is_a_stop():
    sim = _sim()
    sim.add(make_request("a", 10, 4, seed=_stopping_seed(4)))
    sim.run()
    assert sim.finish_reason("a") == "stop"


def test_a_long_prompt_is_computed_in_chunks():
    sim = _sim(max_num_batched_tokens=64)
    sim.add(_endless("a", 150, 1))
    sim.run()
    chunks = [(c.start, c.num_tokens, c.yields) for p in sim.plans for c in p.chunks]
    assert chunks == [(0, 64, False), (64, 64, False), (128, 22, True)]


# ---- several requests


def test_a_new_request_is_admitted_at_the_next_step():
    sim = _sim()
    sim.add(_endless("a", 10, 20))
    for _ in range(3):
        _step(sim)
    sim.add(_endless("b", 10, 20))
    plan = _step(sim)
    assert [joined.req_id for joined in plan.joined_rows] == ["b"]
    assert len(plan.decodes) == len(plan.chunks) == 1


def test_requests_wait_for_a_row_in_the_order_of_arrival():
    sim = _sim(max_batch_size=2)
    for name in "abcd":
        sim.add(_endless(name, 10, 5))
    assert (sim.scheduler.num_running, sim.scheduler.num_waiting) == (0, 4)
    _step(sim)
    assert (sim.scheduler.num_running, sim.scheduler.num_waiting) == (2, 2)
    sim.run()
    joined = [row.req_id for plan in sim.plans for row in plan.joined_rows]
    assert joined == ["a", "b", "c", "d"]


def test_a_row_number_is_used_again_in_a_later_plan_only():
    sim = _sim(max_batch_size=1)
    sim.add(_endless("a", 10, 2))
    sim.add(_endless("b", 10, 2))
    sim.run()
    (left,) = [plan.step for plan in sim.plans if plan.left_rows and not plan.decodes][:1]
    (joined,) = [p.step for p in sim.plans for row in p.joined_rows if row.req_id == "b"]
    assert joined == left + 1


def test_a_more_urgent_request_is_admitted_first():
    sim = _sim(max_batch_size=1)
    sim.add(_endless("normal", 10, 2))
    sim.add(_endless("urgent", 10, 2, priority=1))
    assert _step(sim).joined_rows[0].req_id == "urgent"


def test_a_small_request_does_not_overtake_one_that_waits_for_memory():
    sim = _sim(limit_tokens=1000)
    sim.add(_endless("running", 600, 5))
    _step(sim)
    sim.add(_endless("large", 700, 5))
    sim.add(_endless("small", 10, 5))
    assert _step(sim).joined_rows == ()
    sim.run()
    joined = [row.req_id for plan in sim.plans for row in plan.joined_rows]
    assert joined == ["running", "large", "small"]


def test_decodes_come_in_the_order_of_slab_and_slot():
    sim = _sim()
    for i, size in enumerate((300, 10, 200, 20, 400)):
        sim.add(_endless(f"r{i}", size, 30))
    sim.run()
    for plan in sim.plans:
        places = [(decode.slab_id, decode.slot) for decode in plan.decodes]
        assert places == sorted(places)


def test_a_client_with_one_request_does_not_wait_for_all_those_of_another():
    sim = _sim(max_batch_size=2)
    for i in range(20):
        sim.add(_endless(f"many{i}", 50, 20, client_key="many"))
    _step(sim)
    sim.add(_endless("one", 50, 20, client_key="one"))
    sim.run()
    joined = [row.req_id for plan in sim.plans for row in plan.joined_rows]
    assert joined.index("one") <= 3


def test_a_client_with_long_prompts_has_fewer_turns_than_one_with_short_prompts():
    sim = _sim(max_batch_size=1)
    for i in range(8):
        sim.add(_endless(f"long{i}", 400, 1, client_key="long"))
        sim.add(_endless(f"short{i}", 10, 1, client_key="short"))
    sim.run()
    joined = [row.req_id for plan in sim.plans for row in plan.joined_rows]
    assert sum(name.startswith("short") for name in joined[:8]) >= 5


def test_every_row_decodes_in_every_step_while_others_prefill():
    sim = _sim(max_num_batched_tokens=64)
    sim.add(_endless("a", 10, 60))
    _step(sim)
    sim.add(_endless("b", 1000, 5))
    while not sim.outputs["b"]:
        assert 0 in [decode.row for decode in _step(sim).decodes]


# ---- refusals


def test_a_prompt_that_can_never_fit_is_refused_with_the_arithmetic():
    sim = _sim(limit_tokens=1000)
    with pytest.raises(RequestTooLargeError) as refusal:
        sim.add(_endless("a", 1001, 5))
    assert "1001 tokens x 1 bytes" in str(refusal.value)
    assert "limit is 1000 tokens" in str(refusal.value)
    assert not sim.scheduler.num_running + sim.scheduler.num_waiting


def test_an_answer_that_cannot_fit_ends_where_memory_ends():
    sim = _sim(limit_tokens=100)
    sim.add(_endless("a", 90, 50))
    sim.run()
    assert len(sim.tokens_of("a")) == 11
    assert sim.finish_reason("a") == "length"


@pytest.mark.parametrize(
    ("num_prompt", "max_tokens", "param"), [(0, 5, "prompt"), (5, 0, "max_tokens")]
)
def test_an_impossible_request_is_refused(num_prompt: int, max_tokens: int, param: str):
    sim = _sim()
    with pytest.raises(InvalidRequestError) as refusal:
        sim.add(_endless("a", num_prompt, max_tokens))
    assert refusal.value.param == param


def test_an_id_that_is_in_work_is_refused():
    sim = _sim()
    sim.add(_endless("a", 5, 5))
    with pytest.raises(InvalidRequestError):
        sim.add(_endless("a", 5, 5))


# ---- from another engine


def _resumed(req_id: str, num_prompt: int, max_tokens: int, num_told: int) -> Request:
    """A request of which another engine has told so many tokens."""
    like = _endless(req_id, num_prompt, max_tokens)
    told = [token_at(0, index) for index in range(num_told)]
    prompt = list(like.prompt_ids)
    return Request.from_message(AddRequest(req_id, prompt, like.sampling, output_ids=told), 0.0)


def test_a_request_goes_on_behind_the_tokens_that_another_engine_told():
    sim = _sim()
    sim.add(_resumed("a", 10, 6, num_told=4))
    plan = _step(sim)
    (row,) = plan.joined_rows
    assert row.output_ids == tuple(token_at(0, index) for index in range(4))
    (chunk,) = plan.chunks
    assert (chunk.num_tokens, chunk.yields) == (14, 1)
    sim.run()
    assert sim.tokens_of("a") == [token_at(0, index) for index in (4, 5)]
    assert sim.finish_reason("a") == "length"


def test_who_was_in_the_middle_of_an_answer_goes_before_who_only_waited():
    sim = _sim(max_batch_size=1)
    sim.add(_endless("new", 10, 2))
    sim.add(_resumed("told", 10, 6, num_told=4))
    (row,) = _step(sim).joined_rows
    assert row.req_id == "told"


def test_what_no_longer_fits_is_refused():
    sim = _sim(limit_tokens=12)
    with pytest.raises(RequestTooLargeError):
        sim.add(_resumed("a", 10, 6, num_told=4))


# ---- abort


def test_a_waiting_request_is_aborted_at_once():
    sim = _sim()
    sim.add(_endless("a", 5, 5))
    output = sim.scheduler.abort("a")
    assert output == RequestOutput(req_id="a", token_ids=[], finish_reason="abort")
    assert sim.step() is None


def test_a_running_request_that_is_aborted_leaves_with_the_next_plan():
    sim = _sim()
    sim.add(_endless("a", 10, 50))
    for _ in range(3):
        _step(sim)
    assert sim.abort("a")
    plan = _step(sim)
    assert plan.left_rows == (0,)
    assert not plan.decodes
    sim.run()
    assert sim.finish_reason("a") == "abort"
    assert sim.layout.num_slabs == 0


def test_a_request_whose_last_token_is_under_way_can_be_aborted():
    sim = _sim()
    sim.add(_endless("a", 10, 1))
    _step(sim)
    plan = sim.scheduler.schedule(0.0)
    assert plan is not None
    assert plan.left_rows == (0,)
    assert sim.abort("a")
    sim.runner.execute(plan)
    sim.in_flight.append((plan, {}))
    sim.read()
    sim.run()
    assert sim.tokens_of("a") == []
    assert sim.finish_reason("a") == "abort"


def test_what_is_unknown_or_has_ended_is_not_aborted():
    sim = _sim()
    sim.add(_endless("a", 5, 1))
    sim.run()
    assert not sim.abort("a")
    assert not sim.abort("never seen")


def test_the_id_of_an_aborted_request_may_come_again():
    sim = _sim()
    sim.add(_endless("a", 10, 50))
    for _ in range(3):
        _step(sim)
    sim.scheduler.abort("a")
    sim.add(_endless("a", 10, 3, seed=5))
    sim.run()
    assert sim.tokens_of("a") == [token_at(5, i) for i in range(3)]


# ---- rows grow


def _moves(plan: StepPlan) -> int:
    return sum(isinstance(op, MoveRow) for op in plan.kv_ops)


def test_rows_of_one_length_are_copied_one_a_step_when_they_grow():
    sim = Simulation(SchedulerLimits(lookahead_tokens=0), rules=SlabRules(1 << 16))
    for i in range(8):
        sim.add(_endless(str(i), 100, 400, seed=i))
    sim.run()
    assert max(_moves(plan) for plan in sim.plans) == 1
    assert sum(_moves(plan) for plan in sim.plans) == 8 * 4, "192, 256, 384, 512"
    resized = [op for plan in sim.plans for op in plan.kv_ops if isinstance(op, ResizeSlab)]
    assert not resized, "a slab that is grown into has room for all of them"


def test_a_row_grows_by_as_much_as_it_needs_before_long():
    sim = Simulation(SchedulerLimits(lookahead_tokens=300), rules=SlabRules(1 << 16))
    sim.add(_endless("a", 100, 1000))
    sim.run()
    sizes = [op.capacity for plan in sim.plans for op in plan.kv_ops if isinstance(op, CreateSlab)]
    assert sizes == [256, 512, 1024, 1536], "by what it has, at most by 300"


def test_a_row_whose_end_is_near_does_not_grow_ahead():
    sim = Simulation(SchedulerLimits(lookahead_tokens=0), rules=SlabRules(1 << 16))
    for i in range(8):
        sim.add(_endless(str(i), 100, 29, seed=i))
    sim.run()
    assert not any(_moves(plan) for plan in sim.plans)


# ---- preemption


def _crowded() -> Simulation:
    """Two rows of 64 tokens that both want to grow where only one can."""
    sim = Simulation(SchedulerLimits(lookahead_tokens=0), limit_tokens=150)
    sim.add(_endless("first", 60, 30))
    sim.add(_endless("second", 60, 30, seed=1))
    return sim


def test_where_a_row_cannot_grow_the_latest_request_is_preempted_and_ends_later():
    sim = _crowded()
    sim.run()
    assert sim.scheduler.stats().num_preemptions_total == 1
    assert sim.tokens_of("first") == [token_at(0, i) for i in range(30)]
    assert sim.tokens_of("second") == [token_at(1, i) for i in range(30)]
    assert sim.finish_reason("first") == sim.finish_reason("second") == "length"
    assert {output.num_preemptions for output in sim.outputs["first"]} == {0}
    counts = [output.num_preemptions for output in sim.outputs["second"]]
    assert counts == sorted(counts)
    assert (counts[0], counts[-1]) == (0, 1)


def test_a_preempted_request_computes_prompt_and_output_again_when_all_is_read():
    sim = _crowded()
    sim.run()
    joins = [row for plan in sim.plans for row in plan.joined_rows if row.req_id == "second"]
    assert len(joins) == 2
    num_before = len(joins[1].output_ids)
    assert joins[1].output_ids == tuple(token_at(1, i) for i in range(num_before))
    again = [c for plan in sim.plans for c in plan.chunks if c.row == joins[1].row][-1]
    assert again.start + again.num_tokens == 60 + num_before


def test_the_least_urgent_request_gives_way_even_if_it_came_first():
    sim = Simulation(SchedulerLimits(lookahead_tokens=0), limit_tokens=150)
    background, urgent = _endless("background", 60, 30, priority=-1), _endless("urgent", 60, 30)
    sim.add(background)
    sim.add(urgent)
    sim.run()
    assert (background.num_preemptions, urgent.num_preemptions) == (1, 0)
    assert len(sim.tokens_of("background")) == 30


def test_a_preempted_request_can_be_aborted_while_its_token_is_under_way():
    sim = _crowded()
    victim = sim.scheduler._requests["second"]
    while victim.status is not RequestStatus.PREEMPTED:
        _step(sim)
    assert sim.abort("second")
    sim.run()
    assert sim.finish_reason("second") == "abort"
    assert len(sim.tokens_of("first")) == 30


# ---- contract and numbers


def test_planning_two_steps_ahead_is_a_mistake():
    sim = _sim()
    sim.add(_endless("a", 10, 50))
    assert sim.scheduler.schedule(0.0)
    assert sim.scheduler.schedule(0.0)
    with pytest.raises(AssertionError):
        sim.scheduler.schedule(0.0)


def test_a_step_ends_only_when_every_row_that_samples_has_come():
    sim = _sim()
    sim.add(_endless("a", 10, 50))
    plan = sim.scheduler.schedule(0.0)
    assert plan is not None
    sim.scheduler.update(plan, {}, 0.0)
    with pytest.raises(AssertionError, match="has not come"):
        sim.scheduler.end_step(plan, None)


def test_the_stats_say_what_is_going_on():
    sim = _sim()
    sim.add(_endless("a", 100, 20))
    sim.add(_endless("b", 50, 20))
    for _ in range(4):
        _step(sim)
    stats = sim.scheduler.stats(peak_memory_bytes=5)
    assert (stats.num_running, stats.num_waiting, stats.num_steps_total) == (2, 0, 4)
    assert (stats.prompt_tokens_total, stats.generation_tokens_total) == (150, 6)
    assert stats.kv_live_tokens == 150 + 2 * 3
    assert stats.kv_used_bytes == sim.layout.used_bytes == 128 + 96
    assert stats.forecast_step_s > 0
    assert stats.decode_tokens_per_s > 0
    assert stats.prefill_tokens_per_s > 0
    assert stats.peak_memory_bytes == 5


def test_times_of_admission_and_first_token_are_kept():
    sim = _sim()
    request = _endless("a", 10, 5)
    sim.now_s = 2.0
    sim.add(request)
    sim.run()
    assert request.admitted_s == 2.0
    assert request.first_token_s == pytest.approx(2.01)


def test_the_first_token_says_how_long_the_request_waited_and_was_computed():
    """The second one gets its row when the first has ended."""
    sim = Simulation(SchedulerLimits(max_batch_size=1))
    requests = [_endless(name, 40, 5) for name in ("first", "second")]
    for request in requests:
        sim.add(request)
    sim.run()
    first, second = (sim.outputs[name] for name in ("first", "second"))
    assert (first[0].queue_s, first[0].prefill_s) == (0.0, pytest.approx(0.01))
    assert second[0].queue_s == requests[1].admitted_s
    assert second[0].queue_s >= 0.04
    assert second[0].prefill_s == requests[1].first_token_s - requests[1].admitted_s > 0
    assert all(output.queue_s == output.prefill_s == 0.0 for output in first[1:] + second[1:])


def test_a_request_waits_in_the_queue_from_its_arrival_until_it_gets_a_row():
    sim = _sim()
    sim.now_s = 2.0
    sim.add(make_request("a", 10, 5, arrival_s=1.5))
    sim.run()
    assert sim.outputs["a"][0].queue_s == 0.5


def test_nothing_is_learnt_from_a_step_without_a_time():
    sim = _sim()
    sim.add(_endless("a", 10, 5))
    costs = sim.cost_model.costs
    plan = sim.scheduler.schedule(0.0)
    assert plan is not None
    (work,) = plan.sampling
    sim.scheduler.update(plan, {work.row: RowResult((1,))}, 0.0)
    sim.scheduler.end_step(plan, None)
    assert sim.cost_model.costs == costs
