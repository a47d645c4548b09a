"""Queue, time and size: what is over a limit is told so, at once and honestly."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest

from tests import fakes
from tests.observations import observes
from tests.server.harness import RunningServer, http_request


@contextmanager
def waiting(server: RunningServer, num_requests: int, **fields: Any) -> Iterator[None]:
    """Requests that hold their places while the block runs."""
    body = json.dumps({"prompt": "abc", "seed": fakes.SILENT, **fields}).encode()
    with ExitStack() as links:
        for _ in range(num_requests):
            link = links.enter_context(server.connect())
            link.sendall(http_request("/v1/completions", body))
        server.wait_until(lambda: _num_open(server) == num_requests)
        yield


def _num_open(server: RunningServer) -> int:
    facts = server.health()
    return int(facts["num_running"] + facts["num_waiting"])


@observes("BatchingConfig.max_queue_size", "BatchingConfig.max_batch_size")
def test_beyond_batch_and_queue_it_is_a_429_with_retry_after(start: Callable[..., Any]) -> None:
    server = start(flags={"--max-batch-size": "2", "--max-queue-size": "1"}, engine={"rows": 2})
    with waiting(server, 3):
        response = server.chat("x")
        assert response.status_code == 429
        assert response.json()["error"]["code"] == "queue_full"
        assert 1 <= int(response.headers["retry-after"]) <= 60
        assert server.health()["status"] == "overloaded"
        assert server.status("/health") == 503
    server.wait_until(server.is_idle)
    assert server.chat("x", max_tokens=1).status_code == 200


@observes("AdmissionConfig.max_concurrent_requests")
def test_max_concurrent_requests_is_a_lower_bound(start: Callable[..., Any]) -> None:
    server = start(flags={"--max-concurrent-requests": "1"})
    with waiting(server, 1):
        assert server.chat("x").status_code == 429
    server.wait_until(server.is_idle)
    too_many = server.complete(["a", "b"])
    assert too_many.status_code == 400
    assert too_many.json()["error"]["param"] == "prompt"


def test_many_at_once_are_all_answered_or_refused(start: Callable[..., Any]) -> None:
    server = start(
        flags={"--max-batch-size": "4", "--max-queue-size": "8"}, engine={"rows": 4, "step_s": 0.01}
    )
    statuses: list[int] = []

    def ask() -> None:
        with server.new_client() as client:
            body = {"prompt": "abc", "max_tokens": 20}
            statuses.append(client.post("/v1/completions", json=body).status_code)

    threads = [threading.Thread(target=ask) for _ in range(40)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(statuses) == 40
    assert set(statuses) <= {200, 429}
    assert statuses.count(200) >= 12
    server.wait_until(server.is_idle)


@pytest.fixture(scope="module")
def hasty(model: Any) -> Iterator[RunningServer]:
    server = RunningServer(
        model,
        flags={
            "--first-token-timeout-s": "0.4",
            "--request-timeout-s": "0.2",
            "--max-prompt-tokens": "100",
            "--max-generation-tokens": "50",
            "--max-kv-size": "120",
            "--default-max-tokens": "7",
            "--max-request-bytes": "2000",
        },
        limits={"tick_s": 0.05},
        engine={"step_s": 0.01},
    ).start()
    yield server
    server.stop()


@observes("GenerationConfig.first_token_timeout_s")
def test_no_first_token_in_time_is_a_408(hasty: RunningServer) -> None:
    began_s = time.monotonic()
    response = hasty.complete("abc", seed=fakes.SILENT, stream=True)
    assert response.status_code == 408
    assert response.json()["error"]["code"] == "request_timeout"
    assert "first token" in response.json()["error"]["message"]
    assert 0.4 < time.monotonic() - began_s < 3
    hasty.wait_until(hasty.is_idle)


@observes("GenerationConfig.request_timeout_s")
def test_no_further_token_in_time_is_an_event(hasty: RunningServer) -> None:
    *_, error, done = hasty.events("/v1/completions", prompt="abc", seed=fakes.SILENT_AFTER_TOKEN)
    assert error["error"]["code"] == "request_timeout"
    assert done == "[DONE]"
    hasty.wait_until(hasty.is_idle)


def test_no_further_token_in_time_is_a_408_where_nothing_was_sent(hasty: RunningServer) -> None:
    assert hasty.complete("abc", seed=fakes.SILENT_AFTER_TOKEN).status_code == 408


def test_a_long_answer_lives_as_long_as_tokens_come(hasty: RunningServer) -> None:
    answer = hasty.complete("abc", max_tokens=50).json()
    assert answer["usage"]["completion_tokens"] == 50


@observes("GenerationConfig.max_prompt_tokens")
def test_a_prompt_over_max_prompt_tokens(hasty: RunningServer) -> None:
    error = hasty.complete("x" * 101).json()["error"]
    assert error["code"] == "context_length_exceeded"
    assert "101" in error["message"]
    assert "100" in error["message"]


@observes("GenerationConfig.max_generation_tokens")
def test_max_tokens_over_max_generation_tokens(hasty: RunningServer) -> None:
    error = hasty.complete("x", max_tokens=51).json()["error"]
    assert (error["code"], error["param"]) == ("context_length_exceeded", "max_tokens")


@observes("KVConfig.max_kv_size")
def test_what_can_never_fit_the_kv_memory_is_a_413_with_the_sum(hasty: RunningServer) -> None:
    response = hasty.complete("x" * 90, max_tokens=40)
    assert response.status_code == 413
    assert "90 prompt + 40 max_tokens = 130" in response.json()["error"]["message"]
    assert "120" in response.json()["error"]["message"]


@observes("GenerationConfig.default_max_tokens")
def test_default_max_tokens_is_for_those_who_name_none(hasty: RunningServer) -> None:
    assert hasty.complete("abc").json()["usage"]["completion_tokens"] == 7
    assert hasty.complete("abc", max_tokens=9).json()["usage"]["completion_tokens"] == 9


@observes("ServerConfig.max_request_bytes")
def test_a_body_over_max_request_bytes(hasty: RunningServer) -> None:
    assert hasty.complete("x" * 2000).status_code == 413


def test_time_limits_can_be_off(start: Callable[..., Any]) -> None:
    server = start(
        flags={"--first-token-timeout-s": "0", "--request-timeout-s": "0"},
        limits={"tick_s": 0.05},
    )
    with waiting(server, 1):
        time.sleep(0.5)
        assert _num_open(server) == 1


def test_a_long_prompt_does_not_hold_up_the_others(start: Callable[..., Any]) -> None:
    """Its encoding takes long; the event loop answers probes meanwhile."""
    server = start()
    body = json.dumps({"prompt": "word " * 200_000}).encode()
    codes: list[int] = []
    with server.new_client() as client:
        asking = threading.Thread(
            target=lambda: codes.append(client.post("/v1/completions", content=body).status_code)
        )
        asking.start()
        slowest_s = 0.0
        while asking.is_alive():
            began_s = time.monotonic()
            server.status("/livez")
            slowest_s = max(slowest_s, time.monotonic() - began_s)
        asking.join()
    assert codes == [400]
    assert slowest_s < 1.0
