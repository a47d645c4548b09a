"""/metrics tells where the time of a request went, what was asked for and what a step computes."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterator
from typing import Any

import msgspec
import pytest

from mlx_lm_server.tier_stats import WORDS, TierCounters, TierStats
from tests import fakes
from tests.server.harness import RunningServer
from tests.server.test_health import metric

PREFIX = "mlx_lm_server:"
# What vLLM's dashboards and autoscalers read, with its prefix replaced.
NAMES = [
    "num_requests_running",
    "num_requests_waiting",
    "num_requests_waiting_by_reason",
    "kv_cache_usage_perc",
    "cache_config_info",
    "num_preemptions_total",
    "prefix_cache_queries_total",
    "prefix_cache_hits_total",
    "prompt_tokens_total",
    "prompt_tokens_cached_total",
    "prompt_tokens_by_source_total",
    "generation_tokens_total",
    "request_success_total",
]
HISTOGRAMS = [
    "time_to_first_token_seconds",
    "inter_token_latency_seconds",
    "e2e_request_latency_seconds",
    "request_queue_time_seconds",
    "request_prefill_time_seconds",
    "request_decode_time_seconds",
    "request_inference_time_seconds",
    "request_time_per_output_token_seconds",
    "request_prompt_tokens",
    "request_generation_tokens",
    "request_prefill_kv_computed_tokens",
    "request_params_n",
    "request_params_max_tokens",
    "request_max_num_generation_tokens",
    "request_num_preemptions",
    "iteration_tokens_total",
]
# Of the disk tier, in /metrics with `ssd_` before it, in /health as it is.
TIER_TOTALS = [
    "saves",
    "saves_persisted",
    "write_drops",
    "save_errors",
    "save_retries",
    "enospc",
    "evictions",
    "expired",
    "loads",
    "loads_hit",
    "corrupt",
    "load_errors",
    "bytes_written",
    "bytes_read",
    "restored_tokens",
]
TIER_GAUGES = [
    "stored_records",
    "used_bytes",
    "limit_bytes",
    "pending_saves",
    "is_paused",
    "is_open",
]


def mean(server: RunningServer, name: str) -> float:
    count = metric(server, f"{PREFIX}{name}_count")
    return metric(server, f"{PREFIX}{name}_sum") / count


def labels(server: RunningServer, name: str) -> dict[str, str]:
    text = server.client.get("/metrics").text
    found = re.search(rf"^{PREFIX}{name}{{(.*)}} 1.0$", text, re.MULTILINE)
    assert found is not None
    return dict(re.findall(r'(\w+)="([^"]*)"', found[1]))


def test_the_names_are_those_of_vllm(start: Callable[..., Any]) -> None:
    server = start()
    server.complete("abc", max_tokens=2)
    text = server.client.get("/metrics").text
    for name in (*NAMES, *(f"{h}_{part}" for h in HISTOGRAMS for part in ("bucket", "sum"))):
        assert re.search(rf"^{PREFIX}{name}{{", text, re.MULTILINE), name


def test_a_request_that_waits_for_a_row_has_its_time_in_the_queue(
    start: Callable[..., Any],
) -> None:
    server = start(engine={"rows": 1, "step_s": 0.02})
    asking = [
        threading.Thread(target=server.new_client().post, args=("/v1/completions",), kwargs=how)
        for how in ({"json": {"prompt": "abc", "max_tokens": 20}} for _ in range(2))
    ]
    for thread in asking:
        thread.start()
    for thread in asking:
        thread.join()
    server.wait_until(server.is_idle)
    assert metric(server, f"{PREFIX}request_queue_time_seconds_count") == 2
    assert 0.3 < metric(server, f"{PREFIX}request_queue_time_seconds_sum") < 2
    decode_s = metric(server, f"{PREFIX}request_decode_time_seconds_sum")
    assert 2 * 18 * 0.02 < decode_s < 4
    assert mean(server, "request_prefill_time_seconds") == fakes.PREFILL_S
    inference_s = metric(server, f"{PREFIX}request_inference_time_seconds_sum")
    assert inference_s == pytest.approx(decode_s + 2 * fakes.PREFILL_S)
    assert mean(server, "request_time_per_output_token_seconds") == pytest.approx(decode_s / 2 / 19)


def test_what_was_asked_for_is_counted(start: Callable[..., Any]) -> None:
    server = start()
    server.chat("x", n=3, max_tokens=7)
    server.complete(["ab", "c"], n=2, max_tokens=4)
    server.complete("ab", max_tokens=0, echo=True)
    assert metric(server, f"{PREFIX}request_params_n_count") == 4, "one for each prompt"
    assert metric(server, f"{PREFIX}request_params_n_sum") == 3 + 2 + 2 + 1
    assert metric(server, f"{PREFIX}request_params_max_tokens_count") == 3 + 4 + 1
    assert metric(server, f"{PREFIX}request_params_max_tokens_sum") == 3 * 7 + 4 * 4
    assert metric(server, f"{PREFIX}request_max_num_generation_tokens_sum") == 7 + 4 + 4


def test_each_step_is_counted_with_its_tokens(start: Callable[..., Any]) -> None:
    server = start()
    server.complete("abcde", max_tokens=4)
    server.wait_until(server.is_idle)
    assert metric(server, f"{PREFIX}iteration_tokens_total_count") == 4
    assert metric(server, f"{PREFIX}iteration_tokens_total_sum") == 5 + 3


def test_the_cache_is_described(start: Callable[..., Any]) -> None:
    server = start(flags={"--block-size": "32", "--num-blocks": "9", "--max-kv-size": "6400"})
    assert labels(server, "cache_config_info") == {
        "block_size": "32",
        "cache_dtype": "8-bit, groups of 64",
        "enable_prefix_caching": "True",
        "num_gpu_blocks": "200",
        "num_gpu_blocks_override": "9",
    }
    found = labels(start(flags={"--no-prefix-cache": "true"}), "cache_config_info")
    assert found["enable_prefix_caching"] == "False"
    assert found["num_gpu_blocks_override"] == "None"


def inner_numbers(numbers: TierCounters | TierStats) -> Iterator[float]:
    for name, about in WORDS[type(numbers)].items():
        if about.is_inner:
            yield getattr(numbers, name)


def test_no_number_of_the_disk_tier_is_lost_on_its_way(start: Callable[..., Any]) -> None:
    server = start()
    server.wait_until(lambda: "saves" in server.health()["disk_tier"])
    facts = server.health()["disk_tier"]
    assert facts.pop("folder").endswith("/fake")
    told = fakes.numbered_tier()
    counted, state = msgspec.structs.astuple(told.counters), msgspec.structs.astuple(told)[1:]
    inner = sum(inner_numbers(told.counters)) + sum(inner_numbers(told))
    assert sum(facts.values()) == sum(counted) + sum(state) - inner

    text = server.client.get("/metrics").text
    found = dict(re.findall(rf"^{PREFIX}ssd_(\w+){{[^}}]*}} (\S+)$", text, re.MULTILINE))
    totals = {name for name in found if name.endswith("_total")}
    assert {name.removesuffix("_total"): float(value) for name, value in found.items()} == facts
    assert totals >= {f"{name}_total" for name in TIER_TOTALS}
    assert found.keys() - totals >= set(TIER_GAUGES)
    for name in found:
        kind = "counter" if name in totals else "gauge"
        assert re.search(rf"^# HELP {PREFIX}ssd_{name} \w.*\.$", text, re.MULTILINE)
        assert f"# TYPE {PREFIX}ssd_{name} {kind}\n" in text
    assert facts["is_paused"] is True
