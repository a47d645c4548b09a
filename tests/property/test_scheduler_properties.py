"""Whatever comes and goes, the scheduler's plans are executable and every request ends once."""

from __future__ import annotations

from dataclasses import dataclass, replace

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scheduler_sim import Simulation, expected_output, make_request
from slab_rules import slab_rules
from toy_proposer import ToyProposer

from mlx_lm_server.core.scheduler import SchedulerLimits

slow_ok = settings(max_examples=70, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@dataclass(frozen=True)
class Arrival:
    before_step: int
    num_prompt: int
    max_tokens: int
    priority: int
    client: str
    abort_at_step: int | None


arrivals = st.lists(
    st.builds(
        Arrival,
        before_step=st.integers(0, 40),
        num_prompt=st.one_of(st.integers(1, 40), st.integers(1, 400)),
        max_tokens=st.one_of(st.integers(1, 8), st.integers(1, 150)),
        priority=st.integers(-1, 1),
        client=st.sampled_from("ab"),
        abort_at_step=st.one_of(st.none(), st.none(), st.integers(0, 60)),
    ),
    min_size=1,
    max_size=16,
)

limits = st.builds(
    SchedulerLimits,
    max_batch_size=st.integers(1, 6),
    max_num_batched_tokens=st.integers(6, 200),
    prefill_step_size=st.one_of(st.none(), st.integers(1, 64)),
    prefill_batch_size=st.one_of(st.none(), st.integers(1, 3)),
    itl_goal_s=st.one_of(st.none(), st.floats(0.001, 1.0)),
    lookahead_tokens=st.sampled_from([0, 16, 256]),
    leaving_bytes=st.sampled_from([0, 40, 1 << 20]),
)


@slow_ok
@given(
    sizes=st.lists(st.tuples(st.integers(1, 300), st.integers(1, 40)), min_size=2, max_size=20),
    limits=limits,
)
def test_equal_requests_of_one_client_are_admitted_in_the_order_of_arrival(sizes, limits):
    sim = Simulation(limits, 2000)
    for i, (num_prompt, max_tokens) in enumerate(sizes):
        sim.add(make_request(f"r{i}", num_prompt, max_tokens, seed=i))
    sim.run()
    joined = [row.req_id for plan in sim.plans for row in plan.joined_rows if not row.output_ids]
    first_joins = list(dict.fromkeys(joined))
    assert first_joins == [f"r{i}" for i in range(len(sizes))]


@settings(slow_ok, max_examples=25)
@given(
    num_prompt=st.integers(1, 900),
    max_tokens=st.integers(1, 200),
    flood_prompt=st.integers(1, 300),
    flood_tokens=st.integers(1, 30),
    limits=limits,
)
def test_nobody_starves_beside_a_client_that_never_stops_asking(
    num_prompt, max_tokens, flood_prompt, flood_tokens, limits
):
    sim = Simulation(limits, 1200)
    for i in range(10):
        sim.add(make_request(f"f{i}", flood_prompt, flood_tokens, client_key="flood"))
    sim.add(make_request("one", num_prompt, max_tokens, client_key="one", stops=False))
    for i in range(10, 4000):
        if sim.outputs["one"] and sim.outputs["one"][-1].finish_reason:
            return
        if sim.scheduler.num_waiting < 5:
            sim.add(make_request(f"f{i}", flood_prompt, flood_tokens, client_key="flood"))
        sim.step()
    raise AssertionError("the request starves")


@slow_ok
@given(
    arrivals=arrivals,
    limits=limits,
    limit_tokens=st.one_of(st.integers(400, 1500), st.just(100_000)),
    rules=slab_rules,
    reads_at_once=st.lists(st.booleans(), min_size=1, max_size=7),
    accuracy=st.sampled_from([None, 0.3, 0.9]),
)
def test_every_request_gets_its_tokens_and_one_end_and_all_memory_comes_back(
    arrivals, limits, limit_tokens, rules, reads_at_once, accuracy
):
    proposer = None
    if accuracy is not None:
        limits = replace(limits, max_guesses=5)
        proposer = ToyProposer(accuracy)
    sim = Simulation(limits, limit_tokens, rules=rules, proposer=proposer)
    aborted = set()
    for step in range(61):
        for i, arrival in enumerate(arrivals):
            if arrival.before_step == step:
                sim.add(
                    make_request(
                        f"r{i}",
                        arrival.num_prompt,
                        arrival.max_tokens,
                        seed=i,
                        priority=arrival.priority,
                        client_key=arrival.client,
                    )
                )
            if arrival.abort_at_step == step and sim.abort(f"r{i}"):
                aborted.add(f"r{i}")
        sim.step(read_at_once=reads_at_once[step % len(reads_at_once)])
    sim.run()
    for i, arrival in enumerate(arrivals):
        most = min(arrival.max_tokens, limit_tokens - arrival.num_prompt + 1)
        expected = expected_output(i, most)
        tokens = sim.tokens_of(f"r{i}")
        if f"r{i}" in aborted:
            assert sim.finish_reason(f"r{i}") == "abort"
            assert tokens == expected[: len(tokens)]
        else:
            assert tokens == expected
            assert sim.finish_reason(f"r{i}") == ("stop" if expected[-1] == 7 else "length")
    assert sim.layout.num_slabs == 0
    assert sim.layout.used_bytes == sim.layout.live_tokens == 0
    assert not sim.runner.store.slabs
    assert not sim.runner.rows
    assert sim.scheduler.num_running == sim.scheduler.num_waiting == 0
