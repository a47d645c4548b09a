from __future__ import annotations

import math
import random

import pytest

from mlx_lm_server.core.cost_model import CostModel, StepCosts, StepFeatures, prefill_pairs
from mlx_lm_server.core.plan import RowWork, StepPlan

TRUTH = StepCosts(0.012, 0.0008, 0.0009, 8e-7, 9e-7)


def _random_step(rng: random.Random) -> StepFeatures:
    rows = rng.randint(0, 32)
    step = StepFeatures(rows=rows, kv_tokens=rows * rng.randint(50, 1000))
    if rows == 0 or rng.random() < 0.5:
        step = step.with_chunk(rng.randint(0, 2000), rng.randint(1, 256))
    return step


def _train(model: CostModel, truth: StepCosts, num_steps: int, noise: float = 0.05) -> None:
    rng = random.Random(1)
    true_model = CostModel(truth)
    for _ in range(num_steps):
        step = _random_step(rng)
        model.observe(step, true_model.forecast_s(step) * (1 + rng.gauss(0, noise)))


def _worst_error(model: CostModel, truth: StepCosts) -> float:
    rng = random.Random(2)
    true_model = CostModel(truth)
    steps = [_random_step(rng) for _ in range(200)]
    return max(abs(model.forecast_s(s) / true_model.forecast_s(s) - 1) for s in steps)


def test_a_step_has_the_features_of_its_plan():
    plan = StepPlan(
        step=1,
        left_rows=(),
        joined_rows=(),
        kv_ops=(),
        decodes=(RowWork(0, 0, 0, 99), RowWork(1, 0, 1, 49)),
        chunks=(RowWork(2, 0, 2, 10, (1, 2, 3), 0),),
    )
    assert StepFeatures.of(plan) == StepFeatures(3, 2, 150 + 13, 11 + 12 + 13)
    decodes = StepFeatures(rows=2, kv_tokens=150)
    assert decodes.with_chunk(10, 3) == StepFeatures.of(plan)
    assert prefill_pairs(10, 3) == 11 + 12 + 13


def test_without_data_the_forecast_is_the_calibration():
    step = StepFeatures(100, 4, 1000, 5050)
    expected = 0.012 + 100 * 0.0008 + 4 * 0.0009 + 1000 * 8e-7 + 5050 * 9e-7
    assert CostModel(TRUTH).forecast_s(step) == pytest.approx(expected)
    assert CostModel().forecast_s(StepFeatures()) > 0


@pytest.mark.parametrize("factor", [0.1, 0.5, 1, 3, 10])
def test_it_learns_the_costs_from_a_calibration_that_is_far_off(factor: float):
    model = CostModel(StepCosts(*(factor * cost for cost in TRUTH.as_list())))
    _train(model, TRUTH, num_steps=300)
    assert _worst_error(model, TRUTH) < 0.15


def test_a_single_stall_hardly_moves_the_forecast():
    model = CostModel(TRUTH)
    _train(model, TRUTH, num_steps=100)
    step = StepFeatures(rows=8, kv_tokens=2000)
    before = model.forecast_s(step)
    model.observe(step, 10 * before)
    assert model.forecast_s(step) == pytest.approx(before, rel=0.05)


def test_a_stall_in_the_very_first_step_is_forgotten_soon():
    model = CostModel(TRUTH)
    step = StepFeatures(rows=8, kv_tokens=2000)
    normal_s = model.forecast_s(step)
    model.observe(step, 10 * normal_s)
    assert model.forecast_s(step) < 2 * normal_s
    for _ in range(10):
        model.observe(step, normal_s)
    assert model.forecast_s(step) == pytest.approx(normal_s, rel=0.1)


def test_frequent_stalls_do_not_poison_it():
    model = CostModel(TRUTH)
    step = StepFeatures(rows=8, kv_tokens=2000)
    normal_s = model.forecast_s(step)
    for i in range(400):
        model.observe(step, normal_s * (10 if i % 10 == 0 else 1))
    assert model.forecast_s(step) < 1.2 * normal_s


def test_a_lasting_change_is_followed():
    model = CostModel(TRUTH)
    _train(model, TRUTH, num_steps=300)
    slower = StepCosts(*(3 * cost for cost in TRUTH.as_list()))
    _train(model, slower, num_steps=60, noise=0)
    assert _worst_error(model, slower) < 0.25


def test_an_hour_of_decoding_does_not_change_what_prefill_costs():
    model = CostModel(TRUTH)
    _train(model, TRUTH, num_steps=300)
    rng = random.Random(3)
    true_model = CostModel(TRUTH)
    for i in range(3000):
        step = StepFeatures(rows=8, kv_tokens=1000 + i)
        model.observe(step, true_model.forecast_s(step) * (1 + rng.gauss(0, 0.05)))
    prefill = StepFeatures().with_chunk(500, 256)
    assert model.forecast_s(prefill) == pytest.approx(true_model.forecast_s(prefill), rel=0.2)


def test_no_cost_is_ever_negative():
    model = CostModel(TRUTH)
    rng = random.Random(4)
    for _ in range(500):
        model.observe(_random_step(rng), rng.expovariate(20))
        assert all(cost >= 0 for cost in model.costs.as_list())


@pytest.mark.parametrize("step_s", [0.0, -1.0, math.nan, math.inf])
def test_what_is_no_duration_teaches_nothing(step_s: float):
    model = CostModel(TRUTH)
    model.observe(StepFeatures(rows=1, kv_tokens=10), step_s)
    assert model.costs == TRUTH


def test_the_longest_chunk_uses_up_the_goal_and_no_more():
    model = CostModel(TRUTH)
    decode = StepFeatures(rows=8, kv_tokens=2000)
    for context in (0, 500, 5000):
        num_tokens = model.max_chunk_tokens(0.1 - model.forecast_s(decode), context)
        assert model.forecast_s(decode.with_chunk(context, num_tokens - 1)) < 0.1
        assert model.forecast_s(decode.with_chunk(context, num_tokens + 1)) > 0.1


def test_there_is_no_chunk_where_decoding_alone_misses_the_goal():
    model = CostModel(TRUTH)
    assert model.max_chunk_tokens(0.01 - model.forecast_s(StepFeatures(0, 8, 2000)), 0) == 0


def test_throughputs_follow_from_the_costs():
    model = CostModel(StepCosts(0.01, 0.001, 0.001, 0.0, 0.0))
    assert model.prefill_tokens_per_s(90) == pytest.approx(900)
    assert model.decode_tokens_per_s(10, 0) == pytest.approx(500)


def test_a_long_run_of_mixed_steps_does_not_make_decoding_look_dearer():
    """Chunks over a growing context, each as long as the goal allows: what a chunk costs whatever
    its size, the reading of its context, must not be taken for a cost of decoding."""
    model = CostModel(StepCosts(0.02, 0.0012, 0.0012, 5e-7, 5e-7))

    def true_s(context: int, num_tokens: int) -> float:
        read = 1000 + (context + num_tokens if num_tokens else 0)
        pairs = prefill_pairs(context, num_tokens)
        step_s = 0.012 + 4 * 0.0009 + num_tokens * 0.0008 + read * 1.5e-6 + pairs * 9e-7
        return step_s * (1 + rng.gauss(0, 0.03))

    rng = random.Random(5)
    decode = StepFeatures(rows=4, kv_tokens=1000)
    for _ in range(60):
        model.observe(decode, true_s(0, 0))
    context = 0
    while context < 8000:
        slack_s = 1.6 * model.forecast_s(decode)
        num_tokens = max(4, model.max_chunk_tokens(slack_s, context))
        step = decode.with_chunk(context, num_tokens)
        model.observe(step, true_s(context, num_tokens))
        context += num_tokens
    assert model.forecast_s(decode) == pytest.approx(0.0171, rel=0.25)
