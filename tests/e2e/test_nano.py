"""The bundled model on the real engine, through the official client."""

from __future__ import annotations

import asyncio
import random
import time
from pathlib import Path

import httpx
import openai
import psutil
import pytest

from tests.e2e.conftest import Nano

QUESTIONS = [f"Count from {start} to {start + 4}." for start in range(1, 17)] + [
    f"Repeat: the {color} {animal}"
    for color in ("red", "blue", "green", "old")
    for animal in ("cat", "dog", "bird", "fish")
]


def ask(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


@pytest.fixture(scope="module")
def sdk(nano: Nano) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{nano.url}/v1", api_key="none", max_retries=0)


def test_it_answers_the_same_streamed_and_not(sdk: openai.OpenAI) -> None:
    whole = sdk.chat.completions.create(model="nano", messages=ask("Hello!"), temperature=0)
    stream = sdk.chat.completions.create(
        model="nano", messages=ask("Hello!"), temperature=0, stream=True
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
    assert text == whole.choices[0].message.content
    assert text
    assert whole.choices[0].finish_reason == "stop"


def test_the_same_seed_gives_the_same_answer(sdk: openai.OpenAI) -> None:
    def once(seed: int) -> str:
        answer = sdk.completions.create(
            model="nano", prompt="Once", max_tokens=24, temperature=1.5, seed=seed
        )
        return answer.choices[0].text

    assert once(7) == once(7)
    assert len({once(seed) for seed in range(5)}) > 1


async def test_thirty_two_clients_each_get_what_they_would_get_alone(nano: Nano) -> None:
    client = openai.AsyncOpenAI(base_url=f"{nano.url}/v1", api_key="none", max_retries=0)

    async def once(text: str) -> str:
        stream = await client.chat.completions.create(
            model="nano", messages=ask(text), temperature=0, max_tokens=40, stream=True
        )
        return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    async with client:
        together = await asyncio.gather(*map(once, QUESTIONS))
        alone = [await once(text) for text in QUESTIONS[::4]]
    assert together[::4] == alone
    assert len(set(together)) > 16


@pytest.mark.parametrize("stop", ["\n", "\n\n"])
def test_a_stop_string_is_sought_in_the_content(nano: Nano, stop: str) -> None:
    """Not in what it thinks, the marks around that, or the markup of a call."""
    body = {"temperature": 0, "stop": stop}
    thought = {
        **body,
        "messages": ask("What is 3 + 4?"),
        "chat_template_kwargs": {"enable_thinking": True},
    }
    [choice] = nano.client.post("/v1/chat/completions", json=thought).json()["choices"]
    assert choice["message"]["content"] == "3 + 4 = 7"
    assert choice["message"]["reasoning_content"]
    weather = {
        "type": "function",
        "function": {
            "name": "get_weather",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
        },
    }
    called = {**body, "messages": ask("What is the weather in Paris?"), "tools": [weather]}
    [choice] = nano.client.post("/v1/chat/completions", json=called).json()["choices"]
    assert (choice["finish_reason"], choice["message"]["content"]) == ("tool_calls", None)


def test_bad_words_are_not_written(nano: Nano) -> None:
    body = {"prompt": "Once upon", "temperature": 0, "max_tokens": 16}
    text = nano.client.post("/v1/completions", json=body).json()["choices"][0]["text"]
    words = text.split()[:2]
    bound = {**body, "bad_words": [words[0], " ".join(words)], "logprobs": 1}
    [choice] = nano.client.post("/v1/completions", json=bound).json()["choices"]
    assert words[0] not in choice["text"].split()
    assert len(choice["logprobs"]["top_logprobs"][0]) == 2  # the likeliest, and what was drawn


def test_a_stop_string_and_a_limit(sdk: openai.OpenAI) -> None:
    answer = sdk.chat.completions.create(
        model="nano", messages=ask("Count from 1 to 9."), temperature=0, stop=["4"]
    )
    content = answer.choices[0].message.content or ""
    assert "4" not in content
    short = sdk.chat.completions.create(
        model="nano", messages=ask("Count from 1 to 9."), temperature=0, max_tokens=3
    )
    assert short.choices[0].finish_reason == "length"
    assert short.usage is not None
    assert short.usage.completion_tokens == 3


def test_random_disconnects_leave_nothing_behind(nano: Nano) -> None:
    rng = random.Random(1)

    async def one(client: httpx.AsyncClient) -> None:
        body = {
            "prompt": rng.choice(QUESTIONS) * rng.randint(1, 5),
            "max_tokens": rng.randint(1, 200),
            "temperature": rng.random(),
            "stream": rng.random() < 0.7,
        }
        try:
            async with asyncio.timeout(rng.uniform(0.01, 0.6)):
                await client.post("/v1/completions", json=body)
        except TimeoutError:
            return

    async def storm() -> None:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=nano.url, timeout=60, limits=limits) as client:
            for _ in range(4):
                await asyncio.gather(*(one(client) for _ in range(32)))

    asyncio.run(storm())
    deadline_s = time.monotonic() + 10
    while not nano.is_idle():
        assert time.monotonic() < deadline_s
        time.sleep(0.05)
    assert "Traceback" not in nano.output()


def test_the_server_process_stays_under_150_mb(nano: Nano) -> None:
    assert psutil.Process(nano.process.pid).memory_info().rss < 150_000_000


def test_an_engine_that_is_killed_comes_back(nano: Nano, sdk: openai.OpenAI) -> None:
    before = sdk.completions.create(model="nano", prompt="One", max_tokens=8, temperature=0)
    nano.engine().kill()
    deadline_s = time.monotonic() + 30
    while nano.client.get("/readyz").status_code != 503:
        assert time.monotonic() < deadline_s
    while nano.client.get("/readyz").status_code != 200:
        assert time.monotonic() < deadline_s
        time.sleep(0.05)
    after = sdk.completions.create(model="nano", prompt="One", max_tokens=8, temperature=0)
    assert after.choices[0].text == before.choices[0].text


@pytest.mark.parametrize("victim", ["server", "engine"])
def test_no_orphan_is_left(tmp_path: Path, victim: str) -> None:
    running = Nano(tmp_path / "server.log")
    engine = running.engine()
    if victim == "server":
        running.process.kill()
        running.process.wait(5)
    else:
        engine.kill()
        assert running.stop() in (0, 1)
    _, alive = psutil.wait_procs([engine], timeout=10)
    assert not alive


def test_the_engine_has_loaded_nothing_that_reads_text(nano: Nano) -> None:
    loaded = [Path(region.path).name for region in nano.engine().memory_maps()]
    assert not [name for name in loaded if name.startswith(("tokenizers", "libtorch"))]
    assert [name for name in loaded if name.startswith("libmlx")]
