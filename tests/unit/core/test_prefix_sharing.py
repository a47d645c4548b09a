"""Requests that arrive together with one prompt: who waits for whom, and what is said of it."""

from __future__ import annotations

from scheduler_sim import Simulation

from mlx_lm_server.core.prefix_cache import CacheSettings
from mlx_lm_server.core.prefix_waits import WAIT_MARGIN
from mlx_lm_server.core.request import Request
from mlx_lm_server.core.scheduler import SchedulerLimits
from mlx_lm_server.protocol import SamplingParams

PROMPT = tuple(range(100, 164))
LIMITS = SchedulerLimits(max_batch_size=4, prefill_step_size=16)


def _request(req_id: str, prompt_logprobs: int | None = None) -> Request:
    sampling = SamplingParams(max_tokens=4, seed=0, prompt_logprobs=prompt_logprobs)
    return Request(req_id=req_id, prompt_ids=PROMPT, sampling=sampling)


def _computing(sim: Simulation) -> list[str]:
    plan = sim.step()
    assert plan is not None
    names = {joined.row: joined.req_id for joined in plan.joined_rows}
    return [names[chunk.row] for chunk in plan.chunks]


def _num_cached(sim: Simulation, req_id: str) -> int:
    [report] = [output.cache for output in sim.outputs[req_id] if output.cache]
    return report.num_cached_tokens


def test_the_second_waits_for_what_the_first_computes():
    sim = Simulation(LIMITS, cache=CacheSettings(block_size=16))
    sim.add(_request("first"))
    sim.add(_request("second"))
    assert _computing(sim) == ["first"]
    sim.run()
    [report] = [output.cache for output in sim.outputs["second"] if output.cache]
    assert (report.num_cached_tokens, report.num_from_rows) == (48, 48)
    assert report.why == "the text that is cached ends there"


def test_who_waits_for_another_waits_less_with_every_token_that_is_computed_meanwhile():
    sim = Simulation(LIMITS, cache=CacheSettings(block_size=16))
    second = _request("second")
    sim.add(_request("first"))
    sim.add(second)
    left = []
    for _ in range(3):
        sim.step()
        left.append(sim.scheduler._waits._tokens_left[second])
    assert left == [WAIT_MARGIN * 48 - 16 * step for step in (1, 2, 3)]


def test_who_wants_logprobs_of_the_prompt_computes_it_and_waits_for_nobody():
    sim = Simulation(LIMITS, cache=CacheSettings(block_size=16))
    sim.add(_request("first"))
    sim.add(_request("second", prompt_logprobs=1))
    assert _computing(sim) == ["first", "second"]
    sim.run()
    assert _num_cached(sim, "second") == 0


def test_nothing_near_is_shown_where_nothing_is_near():
    sim = Simulation(LIMITS, cache=CacheSettings(block_size=16))
    sim.add(_request("first"))
    sim.run()
    other = Request(
        req_id="other",
        prompt_ids=tuple(range(200, 240)),
        sampling=SamplingParams(max_tokens=4, seed=0),
    )
    sim.add(other)
    sim.step()
    report = sim.report_of("other")
    assert (report.num_cached_tokens, report.num_nearest_tokens) == (0, 0)
    assert (report.prompt_ids, report.nearest_ids) == ([], [])
    assert report.why == "nothing that begins like this is cached"
