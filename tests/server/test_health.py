"""Probes and numbers."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import psutil
import pytest

from tests import fakes
from tests.server.harness import RunningServer, http_request

MAX_RSS_BYTES = 150_000_000


def metric(server: RunningServer, name: str) -> float:
    """The sum of a metric over its labels."""
    text = server.client.get("/metrics").text
    found = re.findall(rf"^{re.escape(name)}(?:{{[^}}]*}})? (\S+)$", text, re.MULTILINE)
    assert found, f"{name} is not in /metrics"
    return sum(map(float, found))


def test_a_healthy_server_says_ok_and_the_facts(server: RunningServer) -> None:
    facts = server.health()
    assert facts["status"] == "ok"
    assert facts["model"] == "tiny"
    assert facts["engine"]["state"] == "ready"
    assert facts["engine"]["submission"] == "late"
    assert facts["kv_limit_bytes"] == 1_000_000
    assert server.client.get("/livez").json() == {"status": "alive"}
    assert server.client.get("/readyz").json() == {"status": "ready"}


def test_memory_decides_the_status(start: Callable[..., Any]) -> None:
    server = start(engine={"kv_tokens": 1000})
    for prompt, status, code in (("x" * 700, "degraded", 200), ("x" * 950, "overloaded", 503)):
        with server.connect() as link:
            body = f'{{"prompt":"{prompt}","seed":{fakes.SILENT}}}'.encode()
            link.sendall(http_request("/v1/completions", body))
            server.wait_until(lambda status=status: server.health()["status"] == status)
            assert server.status("/health") == code
        server.wait_until(lambda: server.health()["status"] == "ok")


def test_metrics_count_what_happens(start: Callable[..., Any]) -> None:
    server = start(engine={"step_s": 0.002})
    server.complete("abc", max_tokens=5)
    server.complete("abc", max_tokens=5, stop="b")
    server.complete("abc", seed=fakes.FAIL)
    server.client.get("/v1/nothing")
    server.wait_until(server.is_idle)
    prefix = "mlx_lm_server:"
    assert metric(server, f"{prefix}prompt_tokens_total") == 6
    assert metric(server, f"{prefix}generation_tokens_total") >= 7
    assert metric(server, f"{prefix}time_to_first_token_seconds_count") == 2
    assert metric(server, f"{prefix}inter_token_latency_seconds_count") >= 5
    assert metric(server, f"{prefix}e2e_request_latency_seconds_count") == 2
    assert metric(server, f"{prefix}request_success_total") == 3
    assert metric(server, f"{prefix}num_requests_running") == 0
    assert metric(server, f"{prefix}num_requests_waiting") == 0
    assert metric(server, f"{prefix}kv_cache_usage_perc") == 0
    assert metric(server, f"{prefix}kv_cache_bits") == 8
    assert server.client.get("/health").json()["engine"]["kv_bits"] == 8
    assert metric(server, f"{prefix}engine_restarts_total") == 0
    assert metric(server, "active_sequences") == 0
    assert metric(server, "queued_requests") == 0
    assert metric(server, "shutdown_clean") == 0
    text = server.client.get("/metrics").text
    for words in ('finished_reason="length"', 'finished_reason="stop"', 'status="404"'):
        assert words in text


@pytest.mark.parametrize(("level", "number"), [("normal", 0), ("warn", 1), ("critical", 2)])
def test_how_short_memory_is_is_told(start: Callable[..., Any], level: str, number: int) -> None:
    server = start(engine={"memory_pressure": level})
    server.complete("abc", max_tokens=2)
    assert server.health()["memory_pressure"] == level
    assert metric(server, "mlx_lm_server:memory_pressure") == number


def test_the_inter_token_latency_is_the_steps(start: Callable[..., Any]) -> None:
    server = start(engine={"step_s": 0.02})
    server.complete("abc", max_tokens=20)
    count = metric(server, "mlx_lm_server:inter_token_latency_seconds_count")
    total = metric(server, "mlx_lm_server:inter_token_latency_seconds_sum")
    assert 0.018 < total / count < 0.08


def test_the_server_process_stays_small(server: RunningServer) -> None:
    assert psutil.Process(server.process.pid).memory_info().rss < MAX_RSS_BYTES


def test_the_server_process_never_imports_a_model_library() -> None:
    code = (
        "import sys, mlx_lm_server.cli, mlx_lm_server.server.serve;"
        "names = {'mlx', 'mlx_lm', 'transformers', 'torch', 'numpy'};"
        "print(names & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
