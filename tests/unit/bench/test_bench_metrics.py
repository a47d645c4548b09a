from __future__ import annotations

import numpy as np
import pytest

from mlx_lm_server.bench.metrics import percentile, split_gaps, spread, summarize
from mlx_lm_server.bench.trace import Trace


def trace(sent_at: float, *event_times: float, role: str = "client", **fields: object) -> Trace:
    made = Trace(role, len(event_times), sent_at)
    made.event_times = list(event_times)
    made.ended_at = event_times[-1] if event_times else sent_at
    for name, value in fields.items():
        setattr(made, name, value)
    return made


@pytest.mark.parametrize("percent", [0, 5, 50, 95, 99, 100])
@pytest.mark.parametrize("count", [1, 2, 7, 100])
def test_percentiles_are_numpys(count: int, percent: float) -> None:
    values = np.random.default_rng(count).normal(size=count).tolist()
    assert percentile(values, percent) == pytest.approx(np.percentile(values, percent))


def test_a_spread_of_nothing_is_nothing() -> None:
    assert spread([]) is None


def test_latencies_are_pooled_and_throughput_is_the_rounds_median() -> None:
    slow = [trace(0.0, 1.0, 5.0, 10.0)]
    fast = [trace(20.0, 20.1, 20.2, 21.0)]
    faster = [trace(30.0, 30.1, 30.2, 30.5)]
    summary = summarize([slow, fast, faster])
    assert summary.num_requests == 3
    assert summary.output_tokens == 9
    assert summary.output_tokens_per_s == pytest.approx(3.0)
    assert summary.longest_gap_s == pytest.approx(5.0)
    assert summary.ttft_s is not None
    assert summary.ttft_s.max == pytest.approx(1.0)
    assert summary.itl_s is not None
    assert summary.itl_s.count == 6
    assert summary.wall_s == pytest.approx(11.5)


def test_the_servers_count_beats_the_number_of_events() -> None:
    one = trace(0.0, 1.0, 2.0, completion_tokens=20, max_tokens=20)
    assert summarize([[one]]).output_tokens == 20
    assert not one.is_short


def test_errors_are_counted_by_what_they_say_and_have_no_e2e() -> None:
    rounds = [[trace(0.0, 1.0, error="stalled"), trace(0.0, error="refused")], [trace(0.0, 2.0)]]
    summary = summarize(rounds)
    assert summary.num_errors == 2
    assert summary.errors == {"refused": 1, "stalled": 1}
    assert summary.e2e_s is not None
    assert summary.e2e_s.count == 1


def test_an_answer_that_ends_early_is_noticed_but_one_that_we_stopped_is_not() -> None:
    assert trace(0.0, 1.0, 2.0, max_tokens=3).is_short
    assert not trace(0.0, 1.0, 2.0, max_tokens=3, was_stopped=True).is_short


def test_gaps_are_split_by_whether_they_touch_a_window_while_all_decode() -> None:
    late_starter = trace(0.0, 2.0, 3.0, 4.0, 9.0, role="decoder")
    early = trace(0.0, 0.5, 1.5, 2.5, 3.5, 8.5, role="decoder")
    calm, disturbed = split_gaps([late_starter, early], [(4.5, 8.0)])
    assert sorted(calm) == [1.0, 1.0, 1.0]
    assert sorted(disturbed) == [5.0, 5.0]


def test_newcomers_give_their_ttft_against_its_bound_and_the_decoders_gap() -> None:
    decoder = trace(0.0, *[10 + 0.1 * i for i in range(20)], 13.0, 13.15, role="decoder")
    traces = [
        trace(0.0, 1.0, role="idle"),
        decoder,
        trace(11.95, 12.95, role="busy"),
    ]
    extras = summarize([traces]).extras
    assert extras["calm_itl_p50_s"] == pytest.approx(0.1)
    assert extras["calm_gap_max_s"] == pytest.approx(0.15)
    assert extras["disturbed_gap_max_s"] == pytest.approx(1.1)
    assert extras["gap_over_itl"] == pytest.approx(11.0)
    assert extras["busy_prefill_share"] == pytest.approx(1.0)
    assert extras["ttft_over_bound"] == pytest.approx(1.0 / 2.2)


def test_shared_prefix_and_conversation_show_what_the_cache_saved() -> None:
    def with_usage(role: str, sent_at: float, first: float, cached: int) -> Trace:
        return trace(sent_at, first, role=role, prompt_tokens=100, cached_tokens=cached)

    shared = summarize([[with_usage("first", 0, 4, 0), with_usage("other", 5, 6, 80)]]).extras
    assert shared == {"first_ttft_s": 4, "shared_ttft_p50_s": 1, "cached_share": 0.8}
    chat = summarize([[with_usage("turn", 0, 1, 0), with_usage("turn", 2, 4, 50)]]).extras
    assert chat == {"turn1_ttft_s": 1, "turn2_ttft_s": 2, "cached_share": 0.25}
