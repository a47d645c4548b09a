"""The engine dies, hangs, talks nonsense: its streams go on with the next one, and only the request
of which engines die fails."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
import psutil
import pytest

from tests import fakes
from tests.observations import observes
from tests.server.harness import RunningServer


@pytest.fixture(scope="module")
def mortal(model: Any) -> Any:
    server = RunningServer(
        model,
        engine={"step_s": 0.005},
        limits={"hung_s": 0.6, "hung_forecasts": 1.0, "tick_s": 0.05, "first_backoff_s": 0.05,
                "deaths_within_s": 0.001},
    ).start()  # fmt: skip
    yield server
    server.stop()


def revived(server: RunningServer) -> None:
    server.wait_until(lambda: server.status("/readyz") == 200)
    answer = server.chat("alive", max_tokens=6).json()
    assert answer["choices"][0]["message"]["content"] == "alive"


def killer_code(response: httpx.Response) -> str:
    """The code of the error of a request that engines die of."""
    assert response.status_code == 500
    assert "retry-after" not in response.headers
    return str(response.json()["error"]["code"])


def test_a_request_that_engines_die_of_fails_with_the_reason(mortal: RunningServer) -> None:
    response = mortal.chat("x", seed=fakes.DIE)
    assert killer_code(response) == "request_kills_engine"
    assert "exit code 9" in response.json()["error"]["message"]
    revived(mortal)


def test_a_stream_goes_on_where_its_engine_died(mortal: RunningServer) -> None:
    *chunks, last, done = mortal.events(
        "/v1/completions",
        prompt="abc",
        seed=fakes.DIE_AFTER_TOKEN,
        max_tokens=7,
        stream_options={"include_usage": True},
    )
    assert done == "[DONE]"
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == "abcabca"
    assert chunks[-1]["choices"][0]["finish_reason"] == "length"
    assert chunks[-1]["choices"][0]["resumed"] == 1
    assert last["usage"]["completion_tokens"] == 7
    assert last["usage"]["resumed"] == 1


def test_an_answer_that_was_not_resumed_does_not_say_so(mortal: RunningServer) -> None:
    assert "resumed" not in mortal.chat("x", max_tokens=3).text


def test_a_request_that_comes_while_no_engine_runs_waits_for_it(mortal: RunningServer) -> None:
    os.kill(mortal.engine_pid, signal.SIGKILL)
    mortal.wait_until(lambda: mortal.status("/readyz") == 503)
    answer = mortal.chat("alive", max_tokens=6).json()
    assert answer["choices"][0]["message"]["content"] == "alive"
    assert "resumed" not in answer["usage"]
    revived(mortal)


def test_a_client_may_leave_while_no_engine_runs(mortal: RunningServer) -> None:
    with mortal.new_client().stream(
        "POST",
        "/v1/completions",
        json={"prompt": "abc", "seed": fakes.SILENT_AFTER_TOKEN, "stream": True},
    ) as response:
        next(response.iter_lines())
        os.kill(mortal.engine_pid, signal.SIGKILL)
        mortal.wait_until(lambda: mortal.status("/readyz") == 503)
    revived(mortal)
    mortal.wait_until(mortal.is_idle)


def _num_engines(server: RunningServer) -> int:
    return len(psutil.Process(server.process.pid).children())


@observes("ResumeConfig.standby")
def test_a_process_waits_to_take_over_unless_it_is_not_wanted(
    start: Callable[..., RunningServer],
) -> None:
    at_once = {"standby_after_s": 0.0}
    waiting = start(limits=at_once)
    waiting.wait_until(lambda: _num_engines(waiting) == 2)
    alone = start(flags={"--standby": "false"}, limits=at_once)
    for _ in range(5):
        alone.chat("alive", max_tokens=6)
        assert _num_engines(alone) == 1


@observes("ResumeConfig.no_resume")
def test_without_resuming_a_death_is_an_error(start: Callable[..., RunningServer]) -> None:
    server = start(flags={"--no-resume": True}, limits={"first_backoff_s": 0.01, "tick_s": 0.05})
    response = server.chat("x", seed=fakes.DIE)
    assert response.status_code == 503
    assert response.json()["error"]["code"] == "engine_died"
    assert "retry-after" in response.headers
    revived(server)
    *_, error, done = server.events("/v1/completions", prompt="abc", seed=fakes.DIE_AFTER_TOKEN)
    assert error["error"]["code"] == "engine_died"
    assert done == "[DONE]"
    revived(server)
    sdk = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
    stream = sdk.completions.create(
        model="default", prompt="abc", seed=fakes.DIE_AFTER_TOKEN, stream=True
    )
    with pytest.raises(openai.APIError, match="the engine ended"):
        list(stream)


def test_the_probes_tell_a_dead_engine_from_a_dead_server(mortal: RunningServer) -> None:
    os.kill(mortal.engine_pid, signal.SIGKILL)
    mortal.wait_until(lambda: mortal.status("/readyz") == 503)
    assert mortal.status("/livez") == 200
    assert mortal.status("/health") == 503
    revived(mortal)
    assert mortal.health()["engine"]["restarts"] >= 1
    metrics = mortal.client.get("/metrics").text
    assert "engine_restarts_total" in metrics
    assert "resumed_requests_total" in metrics


def test_an_engine_that_hangs_is_killed_and_started_anew(mortal: RunningServer) -> None:
    old_pid = mortal.engine_pid
    response = mortal.chat("x", seed=fakes.HANG)
    assert killer_code(response) == "request_kills_engine"
    assert "silent for" in response.json()["error"]["message"]
    revived(mortal)
    assert not psutil.pid_exists(old_pid)


def test_an_idle_engine_does_not_count_as_hung(mortal: RunningServer) -> None:
    pid = mortal.engine_pid
    os.kill(pid, signal.SIGSTOP)
    try:
        time.sleep(1.0)
        assert mortal.engine_pid == pid
        assert mortal.status("/readyz") == 200
        with ThreadPoolExecutor() as pool:  # silence counts from the first request on
            answer = pool.submit(mortal.chat, "alive", max_tokens=6)
            time.sleep(0.3)
            os.kill(pid, signal.SIGCONT)
        assert answer.result().json()["choices"][0]["message"]["content"] == "alive"
    finally:
        os.kill(pid, signal.SIGCONT)
    assert mortal.engine_pid == pid


def test_an_engine_that_talks_nonsense_is_killed(mortal: RunningServer) -> None:
    assert killer_code(mortal.chat("x", seed=fakes.GARBAGE)) == "request_kills_engine"
    revived(mortal)


def test_a_request_that_the_engine_cannot_do_is_an_error_of_that_request_only(
    mortal: RunningServer,
) -> None:
    pid = mortal.engine_pid
    response = mortal.chat("x", seed=fakes.FAIL)
    assert response.status_code == 500
    assert response.json()["error"]["message"] == "told to fail"
    assert mortal.engine_pid == pid


def test_keep_alives_go_on_while_the_engine_is_started_anew(
    start: Callable[..., RunningServer],
) -> None:
    server = start(engine={"load_s": 0.8}, flags={"--keep-alive-s": 0.1})
    body = {"prompt": "abc", "seed": fakes.DIE_AFTER_TOKEN, "max_tokens": 5, "stream": True}
    with server.client.stream("POST", "/v1/completions", json=body) as response:
        text = response.read().decode()
    assert text.count(": keep-alive") >= 3
    said = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]
    assert "".join(event["choices"][0]["text"] for event in said) == "abcab"


def test_deaths_between_which_tokens_were_made_are_no_crash_loop(
    start: Callable[..., RunningServer],
) -> None:
    server = start(limits={"first_backoff_s": 0.01, "max_deaths": 2, "tick_s": 0.05})
    for _ in range(4):
        revived(server)
        os.kill(server.engine_pid, signal.SIGKILL)
        server.wait_until(lambda: server.status("/readyz") == 503)
    revived(server)


def test_a_crash_loop_ends_the_server_loudly(start: Callable[..., RunningServer]) -> None:
    server = start(limits={"first_backoff_s": 0.01, "max_deaths": 3, "tick_s": 0.05})
    for _ in range(3):
        if server.is_running and server.status("/livez") == 200:
            server.wait_until(lambda: server.status("/readyz") == 200)
            server.chat("x", seed=fakes.DIE)
    assert server.process.wait(30) == 1
    assert "the engine died 3 times" in server.output()


def test_an_engine_that_dies_loading_fails_the_start(start: Callable[..., RunningServer]) -> None:
    server = start(wait=False, engine={"die_loading": 1})
    assert server.process.wait(30) == 1
    assert "while it loaded the model (exit code 3)" in server.output()


def test_a_model_that_cannot_be_loaded_fails_the_start_with_its_reason(
    start: Callable[..., RunningServer],
) -> None:
    server = start(wait=False, engine={"fail_loading": "UnsupportedModelError"})
    assert server.process.wait(30) == 1
    assert "the fake engine was told to fail" in server.output()
    assert "Traceback" not in server.output()


def test_while_it_loads_only_the_process_is_alive(start: Callable[..., RunningServer]) -> None:
    server = start(wait=False, engine={"load_s": 1.0})
    server.wait_until(lambda: server.status("/livez") == 200)
    assert server.status("/readyz") == 503
    assert server.status("/health") == 503
    response = server.chat("x")
    assert response.status_code == 503
    assert response.json()["error"]["code"] == "engine_unavailable"
    server.wait_until(lambda: server.status("/readyz") == 200)


@pytest.mark.parametrize("victim", ["server", "engine"])
def test_no_orphan_is_left_when_either_is_killed(
    start: Callable[..., RunningServer], victim: str
) -> None:
    server = start()
    engine = psutil.Process(server.engine_pid)
    if victim == "server":
        server.process.kill()
        server.process.wait(30)
    else:
        engine.kill()
        server.wait_until(lambda: server.status("/readyz") == 503)
        server.stop()
    psutil.wait_procs([engine], timeout=5)
    assert not engine.is_running() or engine.status() == psutil.STATUS_ZOMBIE
