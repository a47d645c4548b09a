from __future__ import annotations

from statistics import median

import pytest
from scheduler_sim import make_request
from virtual_engine import TRUE_COSTS, Arrival, VirtualEngine

from mlx_lm_server.core.cost_model import StepCosts
from mlx_lm_server.core.request import Request
from mlx_lm_server.core.scheduler import SchedulerLimits

DECODE_STEP_S = 0.023


def _request(req_id: str, num_prompt: int, max_tokens: int) -> Request:
    return make_request(req_id, num_prompt, max_tokens, stops=False)


def _decoders(count: int, num_tokens: int = 500) -> list[Arrival]:
    return [Arrival(0.0, _request(f"d{i}", 128, num_tokens)) for i in range(count)]


def test_a_short_prompt_beside_eight_decoders_waits_at_most_twice_its_idle_time_and_two_steps():
    idle = VirtualEngine(SchedulerLimits())
    idle.run([Arrival(0.0, _request("new", 128, 4))])
    for trial in range(8):
        at_s = 4 + 0.017 * trial
        busy = VirtualEngine(SchedulerLimits(), noise=0.05, seed=trial)
        busy.run([*_decoders(8, 250), Arrival(at_s, _request("new", 128, 4))])
        assert busy.ttft_s("new", at_s) <= 2 * idle.ttft_s("new") + 2 * DECODE_STEP_S


@pytest.mark.parametrize(
    ("initial", "most"),
    [(TRUE_COSTS, 2.7), (StepCosts(), 2.85), (StepCosts(0.05, 0.01, 0.005, 1e-5, 1e-5), 2.7)],
    ids=["calibrated", "default costs", "ten times too slow"],
)
def test_a_long_prompt_neither_stalls_the_decoders_nor_crawls(initial: StepCosts, most: float):
    alone = VirtualEngine(SchedulerLimits())
    alone.run([Arrival(0.0, _request("long", 3000, 2))])
    beside = VirtualEngine(SchedulerLimits(), initial)
    beside.run([*_decoders(4, 700), Arrival(6.0, _request("long", 3000, 2))])
    before = beside.gaps_s("d0", 4.0, 6.0)
    during = beside.gaps_s("d0", 6.0, 6.0 + beside.ttft_s("long", 6.0))
    assert max(during) <= most * median(before)
    assert alone.ttft_s("long") >= 0.52 * beside.ttft_s("long", 6.0)


def test_steps_of_whole_tiles_have_few_sizes_and_stay_below_the_goal():
    ttfts_s, gaps_s, sizes = [], [], []
    for limits in SchedulerLimits(), SchedulerLimits(token_tile=4):
        engine = VirtualEngine(limits, tile=4)
        engine.run([*_decoders(4, 700), Arrival(6.0, _request("long", 3000, 2))])
        ttfts_s.append(engine.ttft_s("long", 6.0))
        gaps_s.append(max(engine.gaps_s("d0", 6.0, 6.0 + ttfts_s[-1])))
        sizes.append(len(set(engine.chunk_sizes)))
    assert ttfts_s[1] < 1.1 * ttfts_s[0]
    assert gaps_s[1] <= gaps_s[0]
    assert sizes[1] < 0.6 * sizes[0]


@pytest.mark.parametrize("num_decoders", [3, 8, 12, 13, 14, 15, 16, 17, 31])
def test_whole_tiles_hold_up_no_prompt_whatever_decodes_beside_it(num_decoders: int):
    costs, ttfts_s = StepCosts(0.012, 0.0004, 0.0004, 5e-7, 1e-7), []
    for limits in SchedulerLimits(), SchedulerLimits(token_tile=4):
        engine = VirtualEngine(limits, costs, tile=4, truth=costs)
        engine.run([*_decoders(num_decoders, 800), Arrival(4.0, _request("long", 2000, 2))])
        ttfts_s.append(engine.ttft_s("long", 4.0))
    assert ttfts_s[1] < 1.15 * ttfts_s[0]


def test_an_explicit_goal_is_kept_while_somebody_decodes():
    engine = VirtualEngine(SchedulerLimits(itl_goal_s=0.04))
    engine.run([*_decoders(4, 300), Arrival(3.0, _request("long", 1000, 2))])
    assert max(engine.gaps_s("d0", 3.0)) <= 0.045


def test_a_short_prompt_does_not_wait_for_a_long_one():
    engine = VirtualEngine(SchedulerLimits())
    long = Arrival(3.0, _request("long", 3000, 2))
    short = Arrival(4.0, _request("short", 128, 2))
    engine.run([*_decoders(4, 700), long, short])
    assert engine.ttft_s("short", 4.0) < 0.5
    assert engine.ttft_s("long", 3.0) > 5


def test_a_long_prompt_goes_on_beside_a_stream_of_short_ones():
    engine = VirtualEngine(SchedulerLimits())
    shorts = [Arrival(3.0 + 0.05 * i, _request(f"s{i}", 128, 2)) for i in range(600)]
    engine.run([Arrival(2.0, _request("long", 1000, 2)), *shorts])
    assert engine.ttft_s("long", 2.0) < 0.5 * engine.times["s599"][0]


def test_many_clients_keep_the_engine_busy_with_little_lost_to_scheduling():
    num_clients, num_requests = 32, 128
    engine = VirtualEngine(SchedulerLimits())
    names = iter(f"r{i}" for i in range(num_requests))
    first = [Arrival(0.0, _request(next(names), 128, 64)) for _ in range(num_clients)]
    engine.on_end = lambda _: (
        _request(name, 128, 64) if (name := next(names, None)) is not None else None
    )
    engine.run(first)
    total_s = max(times[-1] for times in engine.times.values())
    prefill_s = num_requests * (128 * 0.001 + 128 * 129 / 2 * 1.1e-6)
    decode_s = num_requests / num_clients * 64 * (0.014 + 32 * (0.001 + 160e-6))
    assert total_s < 1.1 * (prefill_s + decode_s)
