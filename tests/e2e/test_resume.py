"""Engines die at every stage of a request, and nobody's answer is another one for it."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest

import mlx_lm_server
from tests.e2e import mortal_engine
from tests.server.harness import RunningServer

NANO = Path(mlx_lm_server.__file__).parent / "nano"
PROGRAM = Path(mortal_engine.__file__)
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}},
            "required": ["city"],
        },
    },
}
LONG = " ".join(f"Line {n}: the {n * 7 % 31} cats and {n * 5 % 17} dogs." for n in range(90))


def ask(text: str, **fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": text}], "max_tokens": 40, **fields}


# Greedy and drawn, with all that has to go on too: penalties, logprobs, stop strings, bad words,
# calls, a budget of thoughts, several choices.
REQUESTS: dict[str, dict[str, Any]] = {
    "greedy": ask("Count from 3 to 12.", temperature=0, logprobs=True, top_logprobs=2),
    "drawn": ask("Hello!", seed=5, temperature=1.3, top_p=0.9, ignore_eos=True),
    "penalties": ask(
        "Repeat: the red cat", seed=6, temperature=1.0, ignore_eos=True, frequency_penalty=0.5,
        repetition_penalty=1.1, bad_words=["the red"],
    ),
    "stopped": ask("Count from 1 to 20.", temperature=0, stop=["9"], max_tokens=80),
    "choices": ask("Hello!", seed=7, n=2, temperature=1.2, ignore_eos=True, max_tokens=24),
    "call": ask("What is the weather in Paris?", temperature=0, tools=[WEATHER], max_tokens=80),
    "thoughts": ask(
        "What is 3 + 4?", temperature=0, thinking_budget=8,
        chat_template_kwargs={"enable_thinking": True},
    ),
    "long": ask(f"{LONG} What is the capital of Italy?", temperature=0, max_tokens=16),
}  # fmt: skip


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    folder = tmp_path_factory.mktemp("resume")
    running = RunningServer(
        folder / "nano",
        flags={
            "--model": str(NANO),
            "--ssd-cache-dir": str(folder / "cache"),
            "--ssd-policy": "write_through",
            "--ssd-flush-interval-s": 0.05,
            "--prefill-step-size": 64,
        },
        limits={"hung_s": 1.0, "standby_after_s": 0.0},
        engine_command=(sys.executable, str(PROGRAM), str(folder)),
        env={"PYTHONPATH": ":".join(path for path in sys.path if path)},
    ).start()
    yield running
    running.stop()


def order(server: RunningServer, stage: str, after: int = 0, how: str = "SIGKILL") -> None:
    whole = server.model.parent / "death.json"
    part = whole.with_suffix(".part")
    part.write_text(json.dumps({"stage": stage, "after": after, "how": how}))
    part.rename(whole)


def is_carried_out(server: RunningServer) -> bool:
    return not (server.model.parent / "death.json").exists()


def streamed(server: RunningServer, body: dict[str, Any]) -> dict[str, Any]:
    """What a stream said, in whole; every event of it has to be in order."""
    kinds = ("text", "thoughts", "ids", "scores", "calls", "ends")
    said: dict[str, Any] = {kind: {} for kind in kinds}
    body = {**body, "return_token_ids": True, "stream_options": {"include_usage": True}}
    body = {"stream": True, **body}
    with (
        server.new_client() as client,
        client.stream("POST", "/v1/chat/completions", json=body) as got,
    ):
        assert got.status_code == 200, got.read()
        lines = [line[6:] for line in got.iter_lines() if line.startswith("data: ")]
    assert lines.pop() == "[DONE]"
    for event in map(json.loads, lines):
        assert "error" not in event, event
        if event.get("usage"):
            said["resumed"] = event["usage"].pop("resumed", 0)
            del event["usage"]["prompt_tokens_details"]
            said["usage"] = event["usage"]
        for choice in event["choices"]:
            add(said, choice)
    return said


def add(said: dict[str, Any], choice: dict[str, Any]) -> None:
    index, delta = choice["index"], choice["delta"]
    assert index not in said["ends"], "something came after the end"
    said["text"][index] = said["text"].get(index, "") + (delta.get("content") or "")
    said["thoughts"][index] = said["thoughts"].get(index, "") + delta.get("reasoning_content", "")
    said["ids"].setdefault(index, []).extend(choice.get("token_ids") or ())
    for token in (choice.get("logprobs") or {}).get("content") or ():
        said["scores"].setdefault(index, []).append(token["logprob"])
    for call in delta.get("tool_calls") or ():
        told = said["calls"].setdefault(index, ["", ""])
        told[0] += call["function"].get("name", "")
        told[1] += call["function"]["arguments"]
    if choice["finish_reason"] is not None:
        said["ends"][index] = choice["finish_reason"]


def all_together(server: RunningServer, bodies: dict[str, Any]) -> dict[str, dict[str, Any]]:
    with ThreadPoolExecutor(len(bodies)) as pool:
        answers = {name: pool.submit(streamed, server, body) for name, body in bodies.items()}
        return {name: answer.result() for name, answer in answers.items()}


@pytest.fixture(scope="module")
def undisturbed(server: RunningServer) -> dict[str, dict[str, Any]]:
    return {name: streamed(server, body) for name, body in REQUESTS.items()}


def check_equal(given: dict[str, Any], wanted: dict[str, Any]) -> None:
    scores, expected = given.pop("scores"), dict(wanted)
    for index, values in expected.pop("scores").items():
        assert scores[index] == pytest.approx(values, abs=1e-3)
    del expected["resumed"], given["resumed"]
    assert given == expected


def test_the_requests_do_what_they_are_for(undisturbed: dict[str, Any]) -> None:
    assert json.loads(undisturbed["call"]["calls"][0][1]) == {"city": "Paris"}
    assert undisturbed["call"]["ends"] == {0: "tool_calls"}
    assert undisturbed["stopped"]["ends"] == {0: "stop"}
    assert "8" in undisturbed["stopped"]["text"][0]
    assert len(undisturbed["choices"]["ids"]) == 2
    assert undisturbed["thoughts"]["usage"]["completion_tokens_details"]["reasoning_tokens"] > 0
    assert not any(answer["resumed"] for answer in undisturbed.values())


@pytest.mark.parametrize(
    ("stage", "after", "how"),
    [
        ("queued", 0, "SIGKILL"),
        ("prefill", 0, "SIGKILL"),
        ("restore", 0, "SIGKILL"),
        ("decode", 1, "SIGSEGV"),
        ("decode", 12, "SIGKILL"),  # a call and thoughts among them
        ("decode", 20, "raise"),
        ("decode", 8, "stop"),
        ("last", 0, "SIGABRT"),
    ],
)
def test_answers_are_what_they_would_have_been(
    server: RunningServer, undisturbed: dict[str, Any], stage: str, after: int, how: str
) -> None:
    bodies = dict(REQUESTS)
    if stage == "prefill":  # nothing of it is cached
        bodies = {name: {**body, "cache_salt": "prefill"} for name, body in bodies.items()}
    if stage == "restore":  # an engine that has nothing in memory reads it
        psutil.Process(server.engine_pid).kill()
        server.wait_until(lambda: server.status("/readyz") == 503)
    order(server, stage, after, how)
    answers = all_together(server, bodies)
    assert is_carried_out(server), f"no engine came to {stage}"
    for name, answer in answers.items():
        was_resumed = answer["resumed"]
        assert was_resumed <= 2
        check_equal(answer, undisturbed[name])


@pytest.mark.parametrize("seed", [mortal_engine.KILLS, mortal_engine.KILLS_LATE])
def test_only_the_request_that_kills_fails(
    server: RunningServer, undisturbed: dict[str, Any], seed: int
) -> None:
    killer = ask("Hello!", seed=seed, temperature=1.0, ignore_eos=True)
    with ThreadPoolExecutor() as pool:
        others = pool.submit(all_together, server, REQUESTS)
        time.sleep(0.02)
        body = {"temperature": 1.0, **killer}
        response = server.new_client().post("/v1/chat/completions", json=body)
        answers = others.result()
    assert response.status_code == 500, response.text
    assert response.json()["error"]["code"] == "request_kills_engine"
    assert "signal 11" in response.json()["error"]["message"]
    for name, answer in answers.items():
        check_equal(answer, undisturbed[name])


def test_metrics_and_probes_tell_what_happened(server: RunningServer) -> None:
    server.wait_until(lambda: server.status("/readyz") == 200)
    lines = server.client.get("/metrics").text.splitlines()
    values = {line.split("{")[0]: float(line.split()[-1]) for line in lines if line[0] != "#"}
    assert values["mlx_lm_server:engine_restarts_total"] > 8
    assert values["mlx_lm_server:resumed_requests_total"] > 8
