"""Text completions: every form of prompt."""

from __future__ import annotations

import openai
import pytest

from tests.server.harness import VOCAB_SIZE, RunningServer


def texts(answer: dict[str, object]) -> list[str]:
    choices = answer["choices"]
    assert isinstance(choices, list)
    return [choice["text"] for choice in sorted(choices, key=lambda choice: choice["index"])]


def test_a_string(server: RunningServer) -> None:
    answer = server.complete("hello", max_tokens=5).json()
    assert answer["object"] == "text_completion"
    assert answer["id"].startswith("cmpl-")
    assert texts(answer) == ["hello"]
    assert answer["choices"][0]["logprobs"] is None
    assert answer["usage"]["prompt_tokens"] == 5


def test_a_list_of_strings_gives_a_choice_each(server: RunningServer) -> None:
    answer = server.complete(["abc", "de", "f"], max_tokens=2).json()
    assert texts(answer) == ["ab", "de", "ff"]
    assert answer["usage"] == {
        "prompt_tokens": 6,
        "completion_tokens": 6,
        "total_tokens": 12,
        "prompt_tokens_details": {"cached_tokens": 0},
    }


def test_token_ids(server: RunningServer) -> None:
    ids = [ord(letter) - ord("!") for letter in "hey"]
    assert texts(server.complete(ids, max_tokens=3).json()) == ["hey"]


def test_lists_of_token_ids(server: RunningServer) -> None:
    ids = [[ord(letter) - ord("!") for letter in word] for word in ("abc", "xyz")]
    assert texts(server.complete(ids, max_tokens=3).json()) == ["abc", "xyz"]


def test_a_stream_has_no_role_and_ends_with_a_reason(server: RunningServer) -> None:
    *events, done = server.events("/v1/completions", prompt="hello", max_tokens=5)
    assert done == "[DONE]"
    assert {event["object"] for event in events} == {"text_completion"}
    assert "".join(event["choices"][0]["text"] for event in events) == "hello"
    assert events[-1]["choices"][0]["finish_reason"] == "length"


def test_a_stream_of_several_prompts_says_which_choice_a_text_belongs_to(
    server: RunningServer,
) -> None:
    *events, usage, _ = server.events(
        "/v1/completions",
        prompt=["abcd", "uvwxyz"],
        max_tokens=8,
        stop="z",
        stream_options={"include_usage": True},
    )
    found = {0: "", 1: ""}
    reasons = {}
    for event in events:
        [choice] = event["choices"]
        assert choice["index"] not in reasons, "nothing comes after a finish reason"
        found[choice["index"]] += choice["text"]
        if choice["finish_reason"]:
            reasons[choice["index"]] = choice["finish_reason"]
    assert found == {0: "abcdabcd", 1: "uvwxy"}
    assert reasons == {0: "length", 1: "stop"}
    assert usage["usage"]["completion_tokens"] == 8 + 6
    server.wait_until(server.is_idle)


def test_the_end_token_is_scored_though_it_has_no_text(server: RunningServer) -> None:
    """Evaluations that ask for one token rely on one more score than the prompt has."""
    body = {"prompt": "a<eos>", "max_tokens": 5, "logprobs": 0}
    for echo, tokens in ((False, ["a", "<eos>"]), (True, ["a", "<eos>", "a", "<eos>"])):
        [choice] = server.client.post("/v1/completions", json={**body, "echo": echo}).json()[
            "choices"
        ]
        assert choice["logprobs"]["tokens"] == tokens
        assert choice["text"] == ("a<eos>a" if echo else "a")
        assert choice["finish_reason"] == "stop"


def test_the_sdk_reads_a_stream(server: RunningServer) -> None:
    sdk = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
    stream = sdk.completions.create(model="tiny", prompt="hello", max_tokens=5, stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream) == "hello"


@pytest.mark.parametrize(
    "prompt",
    [
        None,
        1,
        {},
        [],
        "",
        [""],
        [[]],
        ["a", [1]],
        ["a", 1],
        [1, "a"],
        [1.5],
        [True, False],
        [-1],
        [VOCAB_SIZE],
        [[0], [VOCAB_SIZE]],
        [10**30],
        [["a"]],
        [None],
        ["x"] * 2000,
    ],
    ids=lambda prompt: str(prompt)[:20],
)
def test_a_prompt_that_is_none_is_a_400_that_names_it(
    server: RunningServer, prompt: object
) -> None:
    response = server.complete(prompt, max_tokens=2)
    assert response.status_code == 400
    assert response.json()["error"]["param"].startswith("prompt")


@pytest.mark.parametrize(
    ("name", "value"),
    [("suffix", "x"), ("best_of", 2), ("guided_regex", "x"), ("use_beam_search", True)],
)
def test_what_comes_later_is_refused_by_name(
    server: RunningServer, name: str, value: object
) -> None:
    error = server.complete("x", **{name: value}).json()["error"]
    assert (error["param"], error["code"]) == (name, "unsupported_parameter")
    assert name in error["message"]
