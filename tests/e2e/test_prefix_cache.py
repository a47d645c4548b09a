"""What clients see of the prefix cache, on the bundled model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.observations import observes

from .conftest import Nano

SYSTEM = "You are a small model that is asked about capitals. Answer in a sentence. " * 3


def ask(nano: Nano, *texts: str, **more: Any) -> dict[str, Any]:
    """Texts of user and assistant in turn."""
    roles = ("user", "assistant")
    messages = [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]
    body = {"messages": [{"role": "system", "content": SYSTEM}, *messages], "temperature": 0}
    answer = nano.client.post("/v1/chat/completions", json=body | {"explain_cache": True} | more)
    found: dict[str, Any] = answer.raise_for_status().json()
    return found


def metric(nano: Nano, name: str) -> float:
    lines = nano.client.get("/metrics").text.splitlines()
    [line] = [line for line in lines if line.startswith(name)]
    return float(line.split()[-1])


@observes("ChatRequest.explain_cache")
def test_the_next_turn_computes_only_what_is_new(nano: Nano) -> None:
    hits = metric(nano, "mlx_lm_server:prefix_cache_hits_total")
    first = ask(nano, "What is the capital of Peru?")
    said = first["choices"][0]["message"]["content"]
    second = ask(nano, "What is the capital of Peru?", said, "And of Chile?")
    cached = second["usage"]["prompt_tokens_details"]["cached_tokens"]
    [told] = second["usage"]["cache"]
    assert told["cached_tokens"] == cached
    assert told["prompt_tokens"] - cached < 30
    assert metric(nano, "mlx_lm_server:prefix_cache_hits_total") >= hits + cached
    assert metric(nano, "used_blocks") > 0
    assert metric(nano, "mlx_lm_server:kv_cache_cached_bytes") > 0
    assert nano.client.get("/health").json()["kv_cached_bytes"] > 0
    again = nano.client.get("/v1/cache/explain", params={"id": second["id"]}).json()
    assert again == {"id": second["id"], "object": "cache.explanation", "prompts": [told]}


def test_it_is_shown_where_a_prompt_left_the_cached_text(nano: Nano) -> None:
    ask(nano, "What is the capital of Japan?")
    [told] = ask(nano, "What is the capital of Norway?")["usage"]["cache"]
    assert told["prompt_text"].startswith(" Norway?")
    assert "Japan?" in told["nearest_text"] or "Peru?" in told["nearest_text"]
    assert told["nearest_tokens"] == told["cached_tokens"] > 40
    assert told["why"]


def test_explaining_an_answer_that_is_not_remembered_is_a_400(nano: Nano) -> None:
    answer = nano.client.get("/v1/cache/explain", params={"id": "chatcmpl-nobody"})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "id"


@observes("ChatRequest.prompt_cache_key", "CompletionRequest.prompt_cache_key")
def test_requests_of_one_prompt_cache_key_are_counted(nano: Nano) -> None:
    def told(**more: Any) -> tuple[str | None, int]:
        [one] = ask(nano, "What is the capital of Chad?", **more)["usage"]["cache"]
        return one["prompt_cache_key"], one["requests_with_key"]

    assert [told(prompt_cache_key="agent") for _ in range(3)] == [("agent", n) for n in range(3)]
    assert told() == (None, 0)
    body = {"prompt": "x", "max_tokens": 1, "explain_cache": True, "prompt_cache_key": "agent"}
    [one] = nano.client.post("/v1/completions", json=body).json()["usage"]["cache"]
    assert one["requests_with_key"] == 3


@observes("ChatRequest.cache_salt", "CompletionRequest.cache_salt")
def test_salts_keep_prefixes_apart(nano: Nano) -> None:
    def cached(salt: str | None) -> int:
        answer = ask(nano, "What is the capital of Kenya?", cache_salt=salt)
        return int(answer["usage"]["prompt_tokens_details"]["cached_tokens"])

    assert [cached("one"), cached("two")] == [0, 0]
    assert cached("one") > 40


@observes("CompletionRequest.explain_cache")
def test_a_stream_tells_at_its_end(nano: Nano) -> None:
    body = {"prompt": SYSTEM, "max_tokens": 2, "stream": True, "explain_cache": True}
    lines = nano.client.post("/v1/completions", json=body).text.splitlines()
    assert '"cache":[{"prompt_tokens"' in lines[-4] + lines[-3] + lines[-2]


@observes("KVConfig.block_size", "KVConfig.num_blocks", "KVConfig.sequence_cache_size")
def test_blocks_are_as_large_and_as_many_as_was_said(tmp_path: Path) -> None:
    flags = ("--block-size", "64", "--num-blocks", "4", "--sequence-cache-size", "0")
    small = Nano(tmp_path / "log", *flags)
    try:
        prompt = [*range(300, 430)]
        for salt in "abab":
            body = {"prompt": prompt, "max_tokens": 1, "cache_salt": salt}
            usage = small.client.post("/v1/completions", json=body).json()["usage"]
        assert usage["prompt_tokens_details"]["cached_tokens"] == 128
        body = {"prompt": [*range(300, 900)], "max_tokens": 1, "cache_salt": "c"}
        for _ in range(2):
            usage = small.client.post("/v1/completions", json=body).json()["usage"]
        assert usage["prompt_tokens_details"]["cached_tokens"] == 4 * 64
        assert metric(small, "used_blocks") == 4
        assert metric(small, "free_blocks") == 0
    finally:
        assert small.stop() == 0


@observes("KVConfig.no_prefix_cache")
def test_without_the_cache_everything_is_computed(tmp_path: Path) -> None:
    cold = Nano(tmp_path / "log", "--no-prefix-cache")
    try:
        for _ in range(2):
            answer = ask(cold, "What is the capital of Ghana?")
        assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
        assert answer["usage"]["cache"][0]["why"] == "the prefix cache is off"
    finally:
        assert cold.stop() == 0


@pytest.mark.parametrize("n", [4])
def test_choices_share_their_prompt(nano: Nano, n: int) -> None:
    """Each choice computes the last token of the prompt only."""
    answer = ask(nano, f"Tell me a story about {n} foxes and a hen.", n=n, max_tokens=3)
    usage = answer["usage"]
    assert len(answer["choices"]) == n
    assert len({c["message"]["content"] for c in answer["choices"]}) == 1  # greedy
    assert usage["completion_tokens"] == 3 * n
