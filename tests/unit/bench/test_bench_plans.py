from __future__ import annotations

import pytest

from mlx_lm_server.bench import plans
from mlx_lm_server.bench.client import Call
from mlx_lm_server.bench.plans import Calibration, ClosedLoop, Newcomers, Shape, make_maker
from mlx_lm_server.bench.session import fit
from mlx_lm_server.bench.words import WORDS
from mlx_lm_server.bench.workloads import WORKLOADS

CALIBRATION = Calibration()


def plan_of(
    name: str,
    seed: int = 1,
    round_index: int = 0,
    shape: Shape | None = None,
    calibration: Calibration = CALIBRATION,
) -> object:
    make = make_maker(seed, name, round_index, shape or Shape(), calibration)
    return WORKLOADS[name].plan(make)


def calls_of(plan: object) -> list[Call]:
    match plan:
        case plans.ClosedLoop(clients):
            return [call for calls in clients for call in calls]
        case plans.Newcomers(idle, _, _, busy):
            return [*idle, *(call for _, call in busy)]
        case plans.SharedPrefix(first, others):
            return [first, *others]
        case plans.Conversation() as chat:
            return [chat.call([{"role": "user", "content": turn}]) for turn in chat.turns]
    raise AssertionError(plan)


def num_words(call: Call) -> int:
    return len(call.body["prompt"].split())


@pytest.mark.parametrize("name", WORKLOADS)
def test_a_plan_is_the_same_for_the_same_seed_and_round_only(name: str) -> None:
    calls = calls_of(plan_of(name))
    assert calls == calls_of(plan_of(name))
    assert calls != calls_of(plan_of(name, seed=2))
    assert calls != calls_of(plan_of(name, round_index=1))


@pytest.mark.parametrize("name", ["single", "clients8", "clients32", "mixed", "ttft"])
def test_no_prompt_begins_like_another_of_any_round(name: str) -> None:
    calls = [call for i in range(3) for call in calls_of(plan_of(name, round_index=i))]
    beginnings = {tuple(call.body["prompt"].split()[:8]) for call in calls}
    assert len(beginnings) == len(calls)


def test_closed_loops_have_the_clients_and_requests_asked_for() -> None:
    plan = plan_of("clients8", shape=Shape(prompt_tokens=10, output_tokens=7, num_requests=3))
    assert isinstance(plan, ClosedLoop)
    assert [len(calls) for calls in plan.clients] == [3] * 8
    assert {(num_words(c), c.max_tokens) for c in calls_of(plan)} == {(10, 7)}


def test_mixed_gives_each_request_its_own_sampling_and_each_round_the_same_lengths() -> None:
    rounds = [calls_of(plan_of("mixed", round_index=i)) for i in range(2)]
    for calls in rounds:
        assert len({call.body["seed"] for call in calls}) == len(calls) == 32
        assert len({call.body["temperature"] for call in calls}) > 8
        assert len({num_words(call) for call in calls}) > 4
    first, second = (sorted((num_words(c)) for c in calls) for calls in rounds)
    assert first == second
    assert sum(first) / len(first) == pytest.approx(128, rel=0.1)


def test_a_long_prompt_arrives_beside_four_decoders() -> None:
    plan = plan_of("long-prompt")
    assert isinstance(plan, Newcomers)
    assert plan.beside == 4
    assert [num_words(call) for call in calls_of(plan)] == [3000, 3000]
    assert plan.decoders() != plan.decoders()
    assert plan.decoders().max_tokens == Shape().decoder_tokens


def test_a_shared_prefix_is_shared_and_the_rest_is_not() -> None:
    prompts = [call.body["prompt"].split() for call in calls_of(plan_of("shared-prefix"))]
    assert len({tuple(p[:512]) for p in prompts}) == 1
    assert len({tuple(p[512:]) for p in prompts}) == len(prompts) == 9


def test_prompts_get_the_words_that_make_the_tokens_asked_for() -> None:
    plan = plan_of("single", calibration=Calibration(tokens_per_word=2.0, overhead_tokens=4.0))
    assert {num_words(call) for call in calls_of(plan)} == {62}


def test_a_calibration_is_a_line_through_the_probes() -> None:
    assert fit([(64, 131), (128, 259)]) == Calibration(2.0, 3.0)
    assert fit([]) == fit([(64, 64)]) == fit([(64, 5), (128, 5)]) == Calibration()


def test_words_are_many_and_different() -> None:
    assert len(set(WORDS)) == len(WORDS) > 200
