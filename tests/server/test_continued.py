"""A message that is continued, the end of a prompt, and a chat template that a request brings."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.observations import observes
from tests.server.harness import RunningServer, make_model

TEMPLATE = (
    "{%- for m in messages -%}[{{ m.role }}]{{ m.reasoning_content }}{{ m.content | trim }}"
    "{%- endfor -%}{% if add_generation_prompt %}[assistant]{% endif %}"
)
OTHER = "{% for m in messages %}<{{ m.content }}>{% endfor %}{{ add_generation_prompt }}"
ASKED: list[dict[str, Any]] = [{"role": "user", "content": "count"}]
BEGUN = [*ASKED, {"role": "assistant", "content": "1 2 "}]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    folder = make_model(tmp_path_factory.mktemp("continued") / "tiny")
    flags = {"--chat-template": TEMPLATE, "--trust-request-chat-template": True}
    server = RunningServer(folder, flags=flags).start()
    yield server
    server.stop()


def prompt_of(server: RunningServer, path: str, **body: Any) -> str:
    """What is rendered, by each of the ways to ask for it."""
    if path == "/v1/chat/completions":
        asked = {"max_tokens": 1, "return_token_ids": True, **body}
        answer = server.client.post(path, json=asked)
        assert answer.status_code == 200, answer.text
        ids = answer.json()["prompt_token_ids"]
        return str(server.client.post("/detokenize", json={"tokens": ids}).json()["prompt"])
    answer = server.client.post(path, json=body)
    assert answer.status_code == 200, answer.text
    if path == "/apply-template":
        return str(answer.json()["prompt"])
    tokens = answer.json()["tokens"]
    return str(server.client.post("/detokenize", json={"tokens": tokens}).json()["prompt"])


WAYS = (
    ("ChatRequest", "/v1/chat/completions"),
    ("ApplyTemplateRequest", "/apply-template"),
    ("TokenizeRequest", "/tokenize"),
)
BY_CLASS = dict(WAYS)


def each(*names: str) -> list[Any]:
    return [
        pytest.param(path, marks=observes(*(f"{cls}.{name}" for name in names)))
        for cls, path in WAYS
    ]


@pytest.mark.parametrize("path", each("continue_final_message"))
def test_the_prompt_ends_within_a_message_that_is_continued(
    server: RunningServer, path: str
) -> None:
    prompt = prompt_of(server, path, messages=BEGUN, continue_final_message=True)
    assert prompt == "[user]count[assistant]1 2 "
    assert prompt_of(server, path, messages=BEGUN).endswith("1 2[assistant]")


@observes("ChatMessage.prefix")
@pytest.mark.parametrize("path", [path for _, path in WAYS])
def test_a_prefix_is_a_message_that_is_continued(server: RunningServer, path: str) -> None:
    begun = [*ASKED, {"role": "assistant", "content": "1 2 ", "prefix": True}]
    assert prompt_of(server, path, messages=begun) == "[user]count[assistant]1 2 "


@pytest.mark.parametrize("path", each("add_generation_prompt"))
def test_the_prompt_ends_without_the_assistant(server: RunningServer, path: str) -> None:
    prompt = prompt_of(server, path, messages=ASKED, add_generation_prompt=False)
    assert prompt == "[user]count"


@pytest.mark.parametrize("path", each("chat_template"))
def test_a_request_brings_its_template(server: RunningServer, path: str) -> None:
    for _ in range(2):  # the second time it is known
        assert prompt_of(server, path, messages=ASKED, chat_template=OTHER) == "<count>True"
    assert prompt_of(server, path, messages=ASKED) == "[user]count[assistant]"


@observes("ModelConfig.trust_request_chat_template")
def test_a_request_brings_no_template_where_nobody_trusts_it(start: Any) -> None:
    server = start(flags={"--chat-template": TEMPLATE})  # no --trust-request-chat-template
    for path in BY_CLASS.values():
        answer = server.client.post(path, json={"messages": ASKED, "chat_template": OTHER})
        error = answer.json()["error"]
        assert (answer.status_code, error["param"]) == (400, "chat_template")
        assert "--trust-request-chat-template" in error["message"]


@observes("ChatMessage.reasoning")
def test_reasoning_has_two_names(server: RunningServer) -> None:
    for name in ("reasoning", "reasoning_content"):
        said = {"role": "assistant", "content": None, name: "hm"}
        prompt = prompt_of(server, "/apply-template", messages=[*ASKED, said, *ASKED])
        assert prompt == "[user]count[assistant]hm[user]count[assistant]"


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"messages": ASKED, "continue_final_message": True}, "messages"),
        ({"messages": [{"role": "user", "content": "a", "prefix": True}]}, "messages"),
        ({"messages": [{**BEGUN[1], "prefix": True}, *ASKED]}, "messages"),
        (
            {"messages": BEGUN, "continue_final_message": True, "add_generation_prompt": True},
            "add_generation_prompt",
        ),
        (
            {"messages": [*ASKED, {**BEGUN[1], "prefix": True}], "continue_final_message": False},
            "continue_final_message",
        ),
        ({"messages": ASKED, "chat_template": "{% if %}"}, "chat_template"),
        ({"messages": ASKED, "chat_template": ""}, "chat_template"),
        (
            {
                "messages": BEGUN,
                "continue_final_message": True,
                "chat_template": "{{ messages[0].content }}",
            },
            "continue_final_message",
        ),
    ],
)
def test_what_cannot_be_is_refused(server: RunningServer, body: dict[str, Any], param: str) -> None:
    for path in BY_CLASS.values():
        answer = server.client.post(path, json=body)
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, param), path


MESSAGES_OF_CLIENTS: list[dict[str, Any]] = [
    {"content": None, "reasoning_content": "hm", "warning": "w", "refusal": None},
    {"content": "a", "tool_calls": [], "function_call": None, "audio": None, "annotations": []},
    {"content": "a", "id": "msg_1", "type": "message", "status": "completed"},
    {"content": "a", "cache_control": {"type": "ephemeral"}, "reasoning_details": []},
    {"content": [{"type": "text", "text": "a", "cache_control": {"type": "ephemeral"}}]},
    {"content": "a", "provider_specific_fields": {"x": 1}, "thinking_blocks": [], "parsed": None},
    {"content": None, "refusal": "I cannot."},
    {"content": None},
]


@pytest.mark.parametrize("said", MESSAGES_OF_CLIENTS)
def test_answers_come_back_as_clients_keep_them(
    server: RunningServer, said: dict[str, Any]
) -> None:
    messages = [*ASKED, {"role": "assistant", **said}, *ASKED]
    body = {"messages": messages, "max_tokens": 1}
    answer = server.client.post("/v1/chat/completions", json=body)
    assert answer.status_code == 200, answer.text


def test_a_field_that_nobody_knows_is_refused_in_a_message(server: RunningServer) -> None:
    messages = [*ASKED, {"role": "assistant", "content": "a", "mood": "good"}]
    answer = server.client.post("/v1/chat/completions", json={"messages": messages})
    assert answer.json()["error"]["param"] == "messages[1].mood"
