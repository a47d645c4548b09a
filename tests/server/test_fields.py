"""Every field of a request has an effect that is observed here, or is refused by name.

tests/unit/test_every_field_is_observed.py holds the observations against the schemas: a new field
fails there until somebody observes it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, processors

from mlx_lm_server.server.protocols.openai import fields
from tests.observations import observed, observes
from tests.server.harness import EOS_ID, VOCAB_SIZE, RunningServer, make_model
from tests.server.test_tools import CALL, TEMPLATE, TOOL

PATHS = {"chat": "/v1/chat/completions", "completion": "/v1/completions"}
BODIES = {"chat": "ChatRequest", "completion": "CompletionRequest"}
FIM = ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>")
THINK = ("<think>", "</think>")


class Scene:
    """A server that shows what its engine saw."""

    def __init__(self, server: RunningServer, record: Path) -> None:
        self.server = server
        self._record = record

    def answer(self, kind: str, **body: Any) -> dict[str, Any]:
        given = {"messages": [{"role": "user", "content": "abc"}]} if kind == "chat" else {}
        given |= {"prompt": "abc"} if kind == "completion" else {}
        response = self.server.client.post(PATHS[kind], json={**given, "max_tokens": 9, **body})
        assert response.status_code == 200, response.text
        found: dict[str, Any] = response.json()
        return found

    def choice(self, kind: str, **body: Any) -> dict[str, Any]:
        choice: dict[str, Any] = self.answer(kind, **body)["choices"][0]
        return choice

    def text(self, kind: str, **body: Any) -> str:
        choice = self.choice(kind, **body)
        return str(choice["message"]["content"] if kind == "chat" else choice["text"])

    def seen(self, kind: str, **body: Any) -> dict[str, Any]:
        self.answer(kind, **body)
        found: dict[str, Any] = json.loads(self._record.read_text())
        return found

    def events(self, kind: str, **body: Any) -> list[Any]:
        given = {"messages": [{"role": "user", "content": "abc"}], "prompt": "abc"}
        del given["prompt" if kind == "chat" else "messages"]
        return self.server.events(PATHS[kind], **{**given, "max_tokens": 9, **body})

    def post(self, path: str, **body: Any) -> dict[str, Any]:
        response = self.server.client.post(path, json=body)
        assert response.status_code == 200, response.text
        found: dict[str, Any] = response.json()
        return found


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    root = tmp_path_factory.mktemp("fields")
    folder = make_model(root / "tiny")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in FIM + THINK])
    tokenizer.save(str(folder / "tokenizer.json"))
    record = root / "seen.json"
    server = RunningServer(
        folder,
        flags={
            "--chat-template": TEMPLATE + "{{ reasoning_effort }}",
            "--log-level": "debug",
            "--served-model-name": ["tiny", "other"],
        },
        engine={"record_sampling": record, "vocab_size": 270},
    ).start()
    yield Scene(server, record)
    server.stop()


def of_both(names: Iterable[str]) -> list[Any]:
    """Kind of request and field."""
    return [
        pytest.param(kind, name, marks=observes(f"{BODIES[kind]}.{name}"))
        for kind in PATHS
        for name in names
    ]


# field → value, what the engine must see, under which name
ENGINE: dict[str, tuple[Any, Any, str]] = {
    "max_tokens": (7, 7, "max_tokens"),
    "temperature": (0.25, 0.25, "temperature"),
    "top_p": (0.75, 0.75, "top_p"),
    "top_k": (11, 11, "top_k"),
    "min_p": (0.125, 0.125, "min_p"),
    "presence_penalty": (0.5, 0.5, "presence_penalty"),
    "frequency_penalty": (-0.5, -0.5, "frequency_penalty"),
    "repetition_penalty": (1.5, 1.5, "repetition_penalty"),
    "logit_bias": ({"3": 2.0}, {"3": 2.0}, "logit_bias"),
    "seed": (12, 12, "seed"),
    "priority": (4, 4, "priority"),
    "min_tokens": (5, 5, "min_tokens"),
    "typical_p": (0.5, 0.5, "typical_p"),
    "xtc_probability": (0.5, 0.5, "xtc_probability"),
    "xtc_threshold": (0.25, 0.25, "xtc_threshold"),
    "allowed_token_ids": ([64, 65, 64], [64, 65], "allowed_token_ids"),
}


@pytest.mark.parametrize(("kind", "name"), of_both(ENGINE))
def test_the_engine_is_told(scene: Scene, kind: str, name: str) -> None:
    value, expected, where = ENGINE[name]
    assert scene.seen(kind, **{name: value})[where] == expected
    assert scene.seen(kind)[where] != expected


def _observe_stream(scene: Scene, kind: str) -> bool:
    return bool(scene.events(kind)[-1] == "[DONE]")


def _observe_stream_options(scene: Scene, kind: str) -> bool:
    usage = scene.events(kind, stream_options={"include_usage": True})[-2]
    return bool(usage["usage"]["completion_tokens"] == 9)


def _observe_user(scene: Scene, kind: str) -> bool:
    scene.answer(kind, user=f"somebody-{kind}")
    return f"user=somebody-{kind}" in scene.server.output()


def _observe_n(scene: Scene, kind: str) -> bool:
    answer = scene.answer(kind, n=3, seed=5, max_tokens=2)
    alone = scene.answer(kind, max_tokens=2)["usage"]
    seen = json.loads(scene._record.read_text())
    return (
        [choice["index"] for choice in answer["choices"]] == [0, 1, 2]
        and answer["usage"]["prompt_tokens"] == alone["prompt_tokens"]
        and answer["usage"]["completion_tokens"] == 6
        and bool(seen)
    )


def _observe_timings(scene: Scene, kind: str) -> bool:
    whole = scene.answer(kind, timings=True)["usage"]["timings"]
    streamed = scene.events(kind, timings=True)[-2]["usage"]["timings"]
    names = {"queue_s", "ttft_s", "total_s", "prefill_tokens_per_s", "decode_tokens_per_s"}
    return set(whole) == set(streamed) == names and 0 < whole["ttft_s"] <= whole["total_s"]


def _observe_progress(scene: Scene, kind: str) -> bool:
    events = scene.events(kind, return_progress=True)[:-1]
    told = [event["prompt_progress"] for event in events if "prompt_progress" in event]
    return (
        # who reads slowly misses the half
        [one["processed"] for one in told] in ([2, 3], [3])
        and all((one["total"], one["cache"]) == (3, 0) for one in told)
        and all("prompt_progress" in event for event in events[: len(told)])
        and not any("prompt_progress" in event for event in scene.events(kind)[:-1])
    )


def _observe_metadata(scene: Scene, kind: str) -> bool:
    given = {"job": "7"}
    whole, event = scene.answer(kind, metadata=given), scene.events(kind, metadata=given)[0]
    return bool(whole["metadata"] == event["metadata"] == given)


def _observe_prompt_logprobs(scene: Scene, kind: str) -> bool:
    """The fake finds each token of the prompt the likeliest, and then those after it."""
    whole = scene.answer(kind, prompt_logprobs=1, n=2, max_tokens=1)
    places = [whole] if kind == "chat" else whole["choices"]
    second = {"65": {"logprob": -0.5, "rank": 1, "decoded_token": "b"}}
    only = scene.answer(kind, prompt_logprobs=0, max_tokens=0)
    of_last_choice = scene.seen(kind, prompt_logprobs=1, n=2, max_tokens=1)["prompt_logprobs"]
    return (
        len(places) == (1 if kind == "chat" else 2)
        and all(place["prompt_logprobs"][:2] == [None, second] for place in places)
        and of_last_choice == (None if kind == "chat" else 1)
        and only["usage"]["completion_tokens"] == 0
        and only["choices"][0]["finish_reason"] == "length"
        and not (
            only["choices"][0].get("text")
            or only["choices"][0].get("message", {"content": ""})["content"]
        )
    )


def _observe_special_tokens(scene: Scene, kind: str) -> bool:
    text = "a<eos>b"
    asked = {"ignore_eos": True, "max_tokens": 3, **_saying(kind, text)}
    return (
        scene.text(kind, **asked) == scene.text(kind, skip_special_tokens=True, **asked) == "ab"
        and scene.text(kind, skip_special_tokens=False, **asked) == text
        and scene.text(kind, skip_special_tokens=False, **_saying(kind, text)) == "a"
    )


def _saying(kind: str, text: str) -> dict[str, Any]:
    """What makes the fake engine say a text."""
    return {"prompt": text} if kind == "completion" else {"messages": _user(text)}


def _user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def _observe_truncation(scene: Scene, kind: str) -> bool:
    long = _saying(kind, "x" * 5000)
    most = scene.answer(kind, truncate_prompt_tokens=-1, **long)["usage"]
    return (
        scene.text(kind, truncate_prompt_tokens=2, max_tokens=2) == "bc"
        and scene.answer(kind, truncate_prompt_tokens=9)["usage"]["prompt_tokens"] == 3
        and (most["prompt_tokens"], most["total_tokens"]) == (4096 - 9, 4096)
    )


def _observe_token_ids(scene: Scene, kind: str) -> bool:
    """All that were read, the one that ended it too."""
    asked = {"return_token_ids": True, "stop": "b", "n": 2}
    whole = scene.answer(kind, **asked)
    events = [e for e in scene.events(kind, **asked)[:-1] if e["choices"]]
    places = [whole] if kind == "chat" else whole["choices"]
    first = [e if kind == "chat" else e["choices"][0] for e in events]
    streamed = [e["choices"][0] for e in events if e["choices"][0]["index"] == 1]
    told = [one["prompt_token_ids"] for one in first if "prompt_token_ids" in one]
    return (
        [choice["token_ids"] for choice in whole["choices"]] == [[64, 65]] * 2
        and [i for one in streamed for i in one.get("token_ids", ())] == [64, 65]
        and [place["prompt_token_ids"] for place in places] == told
        and told == [[64, 65, 66]] * (1 if kind == "chat" else 2)
        and "token_ids" not in scene.choice(kind)
    )


def _observe_bad_words(scene: Scene, kind: str) -> bool:
    space = scene.post("/tokenize", prompt=" ")["tokens"]
    seen = scene.seen(kind, bad_words=["ab", " c", "\n"])["bad_words"]
    line = scene.post("/tokenize", prompt="\n")["tokens"]
    return bool(seen == [[64, 65], [*space, 64, 65], [66], [*space, 66], line])


def _observe_retention(scene: Scene, kind: str) -> bool:
    def warnings(**hint: str) -> str:
        body = {**_saying(kind, "a"), "max_tokens": 1, **hint}
        return str(scene.server.client.post(PATHS[kind], json=body).headers.get("x-warning"))

    told = warnings(prompt_cache_retention="24h")
    return "prompt_cache_retention has no effect" in told and warnings() == "None"


def _observe_safety_identifier(scene: Scene, kind: str) -> bool:
    scene.answer(kind, safety_identifier=f"one-{kind}")
    return f"safety_identifier=one-{kind}" in scene.server.output()


Observe = Callable[[Scene, str], bool]
BOTH: dict[str, Observe] = {
    "model": lambda s, k: s.answer(k, model="other")["model"] == "other",
    "stop": lambda s, k: s.text(k, stop="b") == "a",
    "stop_token_ids": lambda s, k: s.text(k, stop_token_ids=[ord("b") - ord("!")]) == "a",
    "include_stop_str_in_output": lambda s, k: (
        s.text(k, stop="b", include_stop_str_in_output=True) == "ab"
    ),
    "skip_special_tokens": _observe_special_tokens,
    "truncate_prompt_tokens": _observe_truncation,
    "return_token_ids": _observe_token_ids,
    "bad_words": _observe_bad_words,
    "prompt_cache_retention": _observe_retention,
    "safety_identifier": _observe_safety_identifier,
    "ignore_eos": lambda s, k: EOS_ID not in s.seen(k, ignore_eos=True)["stop_token_ids"],
    "stream": _observe_stream,
    "stream_options": _observe_stream_options,
    "user": _observe_user,
    "n": _observe_n,
    "timings": _observe_timings,
    "metadata": _observe_metadata,
    "return_progress": _observe_progress,
    "prompt_logprobs": _observe_prompt_logprobs,
}


def _with_tools(scene: Scene, **body: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": CALL + CALL + "<eos>"}]
    return scene.choice("chat", messages=messages, tools=[TOOL], max_tokens=400, **body)


def _observe_logprobs(scene: Scene, _kind: str) -> bool:
    whole = scene.choice("chat", logprobs=True, max_tokens=2)["logprobs"]["content"]
    events = scene.events("chat", logprobs=True, max_tokens=2)[:-1]
    streamed = [e["choices"][0]["logprobs"] for e in events if e["choices"][0]["logprobs"]]
    first = {"token": "a", "logprob": -0.5, "bytes": [97], "top_logprobs": []}
    return whole[0] == first and [t for s in streamed for t in s["content"]] == whole


def _observe_budget(name: str) -> Observe:
    def observe(scene: Scene, kind: str) -> bool:
        start, end = VOCAB_SIZE + len(FIM), VOCAB_SIZE + len(FIM) + 1
        kwargs = {"enable_thinking": True}
        bounded = scene.seen(kind, chat_template_kwargs=kwargs, **{name: 5})["thinking"]
        later = scene.seen(kind, **{name: 0})["thinking"]
        return (
            bounded == [5, [start], [end], [end], True]
            and later == [0, [start], [end], [end], False]
            and scene.seen(kind, **{name: -1})["thinking"] is None
        )

    return observe


def _thinking(scene: Scene, **body: Any) -> dict[str, Any]:
    choice = scene.choice("chat", chat_template_kwargs={"enable_thinking": True}, **body)
    return {**choice["message"], "stop_reason": choice["stop_reason"]}


def _observe_stop_in_reasoning(scene: Scene, _kind: str) -> bool:
    ended, free = _thinking(scene, stop="b", stop_in_reasoning=True), _thinking(scene, stop="b")
    return (
        (ended["reasoning_content"], ended["stop_reason"]) == ("a", "b")
        and free["reasoning_content"].startswith("abc")
        and free["stop_reason"] is None
    )


CHAT: dict[str, Observe] = {
    "stop_in_reasoning": _observe_stop_in_reasoning,
    "include_reasoning": lambda s, _k: (
        "reasoning_content" in _thinking(s)
        and "reasoning_content" not in _thinking(s, include_reasoning=False)
    ),
    "messages": lambda s, k: s.text(k, messages=[{"role": "user", "content": "zzz"}])[:3] == "zzz",
    "max_completion_tokens": lambda s, k: s.seen(k, max_completion_tokens=3)["max_tokens"] == 3,
    "chat_template_kwargs": lambda s, k: s.choice(k, chat_template_kwargs={"enable_thinking": True})
    ["message"].get("reasoning_content") is not None,
    "reasoning_effort": lambda s, k: s.choice(k, reasoning_effort="low", max_tokens=7)["message"][
        "reasoning_content"
    ]
    == "low",
    "thinking_budget": _observe_budget("thinking_budget"),
    "thinking_token_budget": _observe_budget("thinking_token_budget"),
    "thinking_budget_tokens": _observe_budget("thinking_budget_tokens"),
    "tools": lambda s, k: len(_with_tools(s)["message"]["tool_calls"]) == 2,
    "tool_choice": lambda s, k: "tool_calls" not in _with_tools(s, tool_choice="none")["message"],
    "parallel_tool_calls": lambda s, k: len(
        _with_tools(s, parallel_tool_calls=False)["message"]["tool_calls"]
    )
    == 1,
    "logprobs": _observe_logprobs,
    "top_logprobs": lambda s, k: [
        one["token"]
        for one in s.choice(k, logprobs=True, top_logprobs=2)["logprobs"]["content"][0][
            "top_logprobs"
        ]
    ]
    == ["a", "b"],
}  # fmt: skip


def _observe_completion_logprobs(scene: Scene, _kind: str) -> bool:
    found = scene.choice("completion", logprobs=2, max_tokens=2)["logprobs"]
    events = scene.events("completion", logprobs=2, max_tokens=2)[:-1]
    streamed = [e["choices"][0]["logprobs"] for e in events if e["choices"][0]["logprobs"]]
    offsets = [offset for one in streamed for offset in one["text_offset"]]
    return offsets == [0, 1] and found == {
        "tokens": ["a", "b"],
        "token_logprobs": [-0.5, -0.5],
        "top_logprobs": [{"a": -0.5, "b": -1.5}, {"b": -0.5, "c": -1.5}],
        "text_offset": [0, 1],
    }


def _observe_echo(scene: Scene, kind: str) -> bool:
    only = scene.answer(kind, echo=True, max_tokens=0)
    events = scene.events(kind, echo=True, max_tokens=2)[:-1]
    return (
        scene.text(kind, echo=True, max_tokens=2) == "abcab"
        and "".join(event["choices"][0]["text"] for event in events) == "abcab"
        and only["choices"][0]["text"] == "abc"
        and only["choices"][0]["finish_reason"] == "length"
        and only["usage"]["completion_tokens"] == 0
        and _tells_an_echo_from_the_prompt(scene)
    )


def _tells_an_echo_from_the_prompt(scene: Scene) -> bool:
    """Each has the alternatives that it asked for; the prompt may be a single token."""
    both = scene.choice("completion", echo=True, logprobs=1, prompt_logprobs=3, max_tokens=1)
    single = scene.choice("completion", prompt="a", echo=True, logprobs=1, prompt_logprobs=1)
    return (
        [len(top) for top in both["logprobs"]["top_logprobs"][1:]] == [1, 1, 1]
        and [len(top) for top in both["prompt_logprobs"][1:]] == [3, 3]
        and single["prompt_logprobs"] == [None]
        and len(single["logprobs"]["tokens"]) == 10
    )


COMPLETION: dict[str, Observe] = {
    "prompt": lambda s, k: s.text(k, prompt="zzz")[:3] == "zzz",
    "echo": _observe_echo,
    # the fake says its prompt: prefix and suffix, between tokens that have no text
    "suffix": lambda s, k: s.text(k, suffix="xyz") == "abcxyz",
    "logprobs": _observe_completion_logprobs,
}


@pytest.mark.parametrize(("kind", "name"), of_both(BOTH))
def test_a_field_of_both_has_its_effect(scene: Scene, kind: str, name: str) -> None:
    assert BOTH[name](scene, kind)


@pytest.mark.parametrize("name", observed("ChatRequest", CHAT))
def test_a_field_of_chat_has_its_effect(scene: Scene, name: str) -> None:
    assert CHAT[name](scene, "chat")


@pytest.mark.parametrize("name", observed("CompletionRequest", COMPLETION))
def test_a_field_of_completions_has_its_effect(scene: Scene, name: str) -> None:
    assert COMPLETION[name](scene, "completion")


MESSAGES = [{"role": "user", "content": "hi"}]
TEXT_BODIES = {
    "tokenize": "TokenizeRequest",
    "detokenize": "DetokenizeRequest",
    "apply-template": "ApplyTemplateRequest",
}
TEXT: dict[str, dict[str, Callable[[Scene], bool]]] = {
    "tokenize": {
        "model": lambda s: (
            s.server.client.post("/tokenize", json={"prompt": "a", "model": "x"}).status_code == 404
        ),
        "prompt": lambda s: s.post("/tokenize", prompt="ab")["tokens"] == [64, 65],
        "content": lambda s: s.post("/tokenize", content="ab")["count"] == 2,
        "messages": lambda s: s.post("/tokenize", messages=MESSAGES)["count"] == 2,
        "add_special_tokens": lambda s: (
            s.post("/tokenize", prompt="a", add_special_tokens=False)["count"] == 1
        ),
        "tools": lambda s: s.post("/tokenize", messages=MESSAGES, tools=[TOOL])["count"] == 4,
        "reasoning_effort": lambda s: (
            s.post("/tokenize", messages=MESSAGES, reasoning_effort="low")["count"] == 6
        ),
        "chat_template_kwargs": lambda s: (
            s.post("/tokenize", messages=MESSAGES, chat_template_kwargs={"enable_thinking": True})[
                "count"
            ]
            == 3
        ),
        "parse_special": lambda s: (
            s.post("/tokenize", content="<eos>")["tokens"] == [EOS_ID]
            and s.post("/tokenize", content="<eos>", parse_special=False)["count"] == 5
        ),
        "with_pieces": lambda s: (
            [
                one["piece"]
                for one in s.post("/tokenize", content="a\u00e9", with_pieces=True)["tokens"]
            ]
            == ["a", [0xC3], [0xA9]]
        ),
        "return_token_strs": lambda s: (
            s.post("/tokenize", prompt="a b", return_token_strs=True)["token_strs"]
            == ["a", "Ġ", "b"]
        ),
    },
    "detokenize": {
        "model": lambda s: (
            s.server.client.post("/detokenize", json={"tokens": [1], "model": "x"}).status_code
            == 404
        ),
        "tokens": lambda s: s.post("/detokenize", tokens=[64, 65, EOS_ID])["prompt"] == "ab<eos>",
    },
    "apply-template": {
        "model": lambda s: (
            s.server.client.post(
                "/apply-template", json={"messages": MESSAGES, "model": "x"}
            ).status_code
            == 404
        ),
        "messages": lambda s: s.post("/apply-template", messages=MESSAGES)["prompt"] == "hi",
        "tools": lambda s: (
            s.post("/apply-template", messages=MESSAGES, tools=[TOOL])["prompt"] == "f|hi"
        ),
        "reasoning_effort": lambda s: (
            s.post("/apply-template", messages=MESSAGES, reasoning_effort="low")["prompt"]
            == "hi<think>low"
        ),
        "chat_template_kwargs": lambda s: (
            s.post(
                "/apply-template",
                messages=MESSAGES,
                chat_template_kwargs={"enable_thinking": True},
            )["prompt"]
            == "hi<think>"
        ),
    },
}


@pytest.mark.parametrize(
    ("path", "name"),
    [
        pytest.param(path, name, marks=observes(f"{TEXT_BODIES[path]}.{name}"))
        for path, names in TEXT.items()
        for name in names
    ],
)
def test_a_field_of_the_tokenizers_endpoints_has_its_effect(
    scene: Scene, path: str, name: str
) -> None:
    assert TEXT[path][name](scene)


@observes("TokenizeRequest.add_special")
def test_special_tokens_are_added_as_the_name_of_the_text_lets_expect(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """llama.cpp's `content` has none by default, vLLM's `prompt` has."""
    folder = make_model(tmp_path_factory.mktemp("begins") / "tiny")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<user> $A", special_tokens=[("<user>", EOS_ID + 1)]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    server = RunningServer(folder).start()

    def count(**body: Any) -> int:
        return int(server.client.post("/tokenize", json=body).json()["count"])

    assert (count(prompt="a"), count(content="a")) == (2, 1)
    assert (count(prompt="a", add_special=False), count(content="a", add_special=True)) == (1, 2)
    both = {"content": "a", "add_special": True, "add_special_tokens": True}
    error = server.client.post("/tokenize", json=both).json()["error"]
    assert error["param"] == "add_special"
    server.stop()


@observes("ApplyTemplateRequest.add_generation_prompt", "TokenizeRequest.add_generation_prompt")
def test_the_generation_prompt_can_be_left_out(server: RunningServer) -> None:
    body = {"messages": MESSAGES, "add_generation_prompt": False}
    assert server.client.post("/apply-template", json=body).json() == {"prompt": "<user>hi"}
    assert server.client.post("/tokenize", json=body).json()["count"] == 3
    del body["add_generation_prompt"]
    prompt = server.client.post("/apply-template", json=body).json()["prompt"]
    assert prompt == "<user>hi<assistant>"


@pytest.mark.parametrize(
    ("kind", "name"),
    [("chat", name) for name in fields.CHAT] + [("completion", name) for name in fields.COMPLETION],
)
def test_what_is_not_done_is_refused_by_name(scene: Scene, kind: str, name: str) -> None:
    body = {"messages": MESSAGES, "prompt": "x", name: {"not": "neutral"}}
    del body["prompt" if kind == "chat" else "messages"]
    error = scene.server.client.post(PATHS[kind], json=body).json()["error"]
    assert (error["param"], error["code"]) == (name, "unsupported_parameter")


@pytest.mark.parametrize("name", fields.MESSAGE)
def test_what_is_not_done_of_a_message_is_refused_by_name(scene: Scene, name: str) -> None:
    message = {**MESSAGES[0], name: {"not": "neutral"}}
    error = scene.server.client.post(PATHS["chat"], json={"messages": [message]}).json()["error"]
    assert (error["param"], error["code"]) == (f"messages[0].{name}", "unsupported_parameter")


@pytest.mark.parametrize("kind", PATHS)
@pytest.mark.parametrize("name", fields.STREAM_OPTIONS)
def test_what_is_not_done_of_a_stream_is_refused_by_name(
    scene: Scene, kind: str, name: str
) -> None:
    body = {"messages": MESSAGES, "prompt": "x", "stream": True, "stream_options": {name: 1}}
    del body["prompt" if kind == "chat" else "messages"]
    error = scene.server.client.post(PATHS[kind], json=body).json()["error"]
    assert (error["param"], error["code"]) == (f"stream_options.{name}", "unsupported_parameter")


@pytest.mark.parametrize(
    ("kind", "body", "param"),
    [
        ("completion", {"allowed_token_ids": []}, "allowed_token_ids"),
        ("chat", {"allowed_token_ids": [1, 270]}, "allowed_token_ids"),
        ("chat", {"allowed_token_ids": [64], "bad_words": ["a"]}, "allowed_token_ids"),
        ("completion", {"allowed_token_ids": [EOS_ID], "min_tokens": 2}, "allowed_token_ids"),
        ("chat", {"bad_words": [""]}, "bad_words[0]"),
        ("chat", {"bad_words": ["x" * 257]}, "bad_words[0]"),
        ("chat", {"bad_words": ["x"] * 257}, "bad_words"),
        ("completion", {"truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
        ("completion", {"truncate_prompt_tokens": -2}, "truncate_prompt_tokens"),
        ("completion", {"truncate_prompt_tokens": 2, "suffix": "x"}, "truncate_prompt_tokens"),
        ("completion", {"stop_in_reasoning": True}, "stop_in_reasoning"),
        ("chat", {"prompt_cache_key": "x" * 1025}, "prompt_cache_key"),
        ("chat", {"prompt_cache_retention": "1h"}, "prompt_cache_retention"),
        ("chat", {"max_completion_tokens": 5000}, "max_completion_tokens"),
        ("chat", {"max_tokens": 5000}, "max_tokens"),
        ("chat", {"messages": [{"role": "user", "content": "x" * 5000}]}, "messages"),
        ("completion", {"prompt": "x" * 5000}, "prompt"),
    ],
    ids=str,
)
def test_what_cannot_be_done_is_a_400_that_names_the_field(
    scene: Scene, kind: str, body: dict[str, Any], param: str
) -> None:
    response = scene.server.client.post(PATHS[kind], json={**_saying(kind, "abc"), **body})
    assert (response.status_code, response.json()["error"]["param"]) == (400, param)


def test_what_ended_an_answer_is_told_whole_and_streamed(scene: Scene) -> None:
    for kind in PATHS:
        for body, reason in (
            ({"stop": ["z", "b"]}, "b"),
            ({"stop_token_ids": [65]}, 65),
            ({**_saying(kind, "a<eos>")}, None),
            ({"max_tokens": 1}, None),
        ):
            assert scene.choice(kind, **body)["stop_reason"] == reason
            *chunks, last = (e["choices"][0] for e in scene.events(kind, **body)[:-1])
            assert last["stop_reason"] == reason
            assert not any("stop_reason" in chunk for chunk in chunks)


@pytest.mark.parametrize("kind", PATHS)
def test_logprobs_end_where_the_text_ends(scene: Scene, kind: str) -> None:
    """Streamed too, where a token may wait for its text."""
    asked = {"stop": "cz", "logprobs": True if kind == "chat" else 0, **_saying(kind, "abcbczz")}
    whole = scene.choice(kind, **asked)["logprobs"]
    events = [e["choices"][0] for e in scene.events(kind, **asked)[:-1]]
    streamed = [one["logprobs"] for one in events if one["logprobs"]]
    if kind == "chat":
        tokens = [one["token"] for one in whole["content"]]
        assert [one for part in streamed for one in part["content"]] == whole["content"]
    else:
        tokens = whole["tokens"]
        assert whole["text_offset"] == [0, 1, 2, 3]
        for name in whole:
            assert [one for part in streamed for one in part[name]] == whole[name]
        assert whole["top_logprobs"] == [{token: -0.5} for token in tokens]
    assert tokens == list("abcb")


@pytest.mark.parametrize("kind", PATHS)
def test_an_answer_of_nothing_has_an_empty_list_of_logprobs(scene: Scene, kind: str) -> None:
    choice = scene.choice(kind, stop="a", logprobs=True if kind == "chat" else 0)
    assert choice["logprobs"]["content" if kind == "chat" else "tokens"] == []
    assert scene.choice(kind, stop="a")["logprobs"] is None
