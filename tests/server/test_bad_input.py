"""Whatever comes in, the answer is a clear 4xx in OpenAI's shape, and the server lives on."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.server.harness import RunningServer, http_request, read_all

CHAT = "/v1/chat/completions"
MESSAGES = [{"role": "user", "content": "x"}]


def refused(server: RunningServer, body: bytes, status: int = 400) -> dict[str, Any]:
    """The error object of a body that must be refused."""
    response = server.client.post(CHAT, content=body)
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    error: dict[str, Any] = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    assert error["message"]
    return error


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"not json",
        b"[]",
        b"null",
        b'"text"',
        b"1",
        b'{"a":1} x',
        b"{'messages': 1}",
        b"\xff\xfe{}",
        b'\xef\xbb\xbf{"messages":[]}',
        b'{"messages": "\xff"}',
        b"[" * 100_000,
        b'{"messages":' * 10_000,
        b'{"seed":' + b"9" * 5000 + b"}",
    ],
    ids=lambda body: repr(body[:20]),
)
def test_what_is_no_json_object(server: RunningServer, body: bytes) -> None:
    refused(server, body)


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_numbers_that_json_does_not_have(server: RunningServer, number: str) -> None:
    body = f'{{"messages":[{{"role":"user","content":"x"}}],"temperature":{number}}}'
    refused(server, body.encode())


def test_a_key_twice(server: RunningServer) -> None:
    error = refused(server, b'{"messages":[{"role":"user","content":"x"}],"seed":1,"seed":2}')
    assert "seed" in error["message"]


@pytest.mark.parametrize(
    "body",
    [
        b'{"messages":[{"role":"user","content":"\\ud800"}]}',
        b'{"messages":[{"role":"user","content":"x"}],"stop":"\\udfff"}',
        b'{"messages":[{"role":"user","content":"x"}],"\\ud800":1}',
        b'{"messages":[{"role":"user","content":"x"}],"chat_template_kwargs":{"\\ud800":1}}',
        b'{"messages":[{"role":"user","content":"x"}],"chat_template_kwargs":{"a":["\\ud800"]}}',
        b'{"model":"\\ud800","messages":[{"role":"user","content":"x"}]}',
    ],
)
def test_a_lone_surrogate(server: RunningServer, body: bytes) -> None:
    assert "Unicode" in refused(server, body)["message"]


def test_a_surrogate_pair_is_a_character(server: RunningServer) -> None:
    body = b'{"messages":[{"role":"user","content":"\\ud83e\\udd4a"}],"max_tokens":5}'
    response = server.client.post(CHAT, content=body)
    assert response.json()["choices"][0]["message"]["content"] == "🥊"


CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
BAD_FIELDS: list[tuple[str, Any]] = [
    ("messages", []),
    ("messages", None),
    ("messages", "x"),
    ("messages", {}),
    ("messages", [1]),
    ("messages", [None]),
    ("messages", [[]]),
    ("messages", [{}]),
    ("messages", [{"role": "user"}]),
    ("messages", [{"content": "x"}]),
    ("messages", [{"role": "user", "content": None}]),
    ("messages", [{"role": "user", "content": 1}]),
    ("messages", [{"role": "user", "content": {}}]),
    ("messages", [{"role": "user", "content": [1]}]),
    ("messages", [{"role": "user", "content": [{"type": "text"}]}]),
    ("messages", [{"role": "user", "content": [{"type": "text", "text": 1}]}]),
    ("messages", [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]),
    ("messages", [{"role": "user", "content": [{"type": ["text"], "text": "x"}]}]),
    ("messages", [{"role": "robot", "content": "x"}]),
    ("messages", [{"role": ["user"], "content": "x"}]),
    ("messages", [{"role": "function", "name": "f", "content": "x"}]),
    ("messages", [{"role": "user", "content": "x", "color": "red"}]),
    ("messages", [{"role": "assistant", "content": "x", "tool_calls": [{"id": "1"}]}]),
    ("max_tokens", 0),
    ("max_tokens", -1),
    ("max_tokens", 1.5),
    ("max_tokens", "5"),
    ("max_tokens", True),
    ("max_tokens", 10**30),
    ("max_completion_tokens", -5),
    ("temperature", -0.1),
    ("temperature", 2.1),
    ("temperature", "hot"),
    ("temperature", True),
    ("temperature", [1]),
    ("temperature", 10**400),
    ("top_p", 1.01),
    ("top_p", -1),
    ("top_k", -2),
    ("top_k", 0.5),
    ("top_k", 10**20),
    ("min_p", 2),
    ("presence_penalty", 3),
    ("frequency_penalty", -3),
    ("repetition_penalty", 0),
    ("repetition_penalty", -1),
    ("logit_bias", []),
    ("logit_bias", {"x": 1}),
    ("logit_bias", {"1": 101}),
    ("logit_bias", {"1": "a"}),
    ("logit_bias", {"1": None}),
    ("logit_bias", {"-1": 1}),
    ("logit_bias", {"99999": 1}),
    ("logit_bias", {"\u0661": 1}),
    ("logit_bias", {"9" * 5000: 1}),
    ("seed", 1.5),
    ("seed", "1"),
    ("seed", True),
    ("seed", 2**64),
    ("seed", -(2**63) - 1),
    ("stop", 1),
    ("stop", ""),
    ("stop", ["a", ""]),
    ("stop", [1]),
    ("stop", {}),
    ("stop", ["x"] * 65),
    ("stop_token_ids", [-1]),
    ("stop_token_ids", [99999]),
    ("stop_token_ids", ["a"]),
    ("stop_token_ids", [True]),
    ("stream", "yes"),
    ("stream", 1),
    ("stream_options", {"include_usage": True}),
    ("user", 1),
    ("priority", "high"),
    ("priority", 2**40),
    ("chat_template_kwargs", []),
    ("chat_template_kwargs", "x"),
    ("n", 0),
    ("n", 129),
    ("n", 1.0),
    ("n", True),
    ("min_tokens", -1),
    ("min_tokens", 4097),
    ("ignore_eos", 1),
    ("typical_p", 0),
    ("typical_p", 1.1),
    ("xtc_probability", 2),
    ("xtc_threshold", 0.6),
    ("metadata", {"a": 1}),
    ("metadata", {str(i): "x" for i in range(17)}),
    ("timings", "yes"),
    ("logprobs", 3),
    ("top_logprobs", 3),
    ("return_progress", True),
    ("top_logprobs", 21),
    ("reasoning_effort", "huge"),
    ("parallel_tool_calls", "no"),
    ("tools", {}),
    ("tools", [{"type": "function"}]),
    ("tools", [{"type": "retrieval", "function": {"name": "f"}}]),
    ("tools", [{"type": "function", "function": {"name": "f", "parameters": []}}]),
    ("tool_choice", "sometimes"),
    ("messages", [{"role": "user", "content": "x", "tool_calls": [CALL]}]),
    ("chat_template_kwargs", {"enable_thinking": True}),
    ("chat_template_kwargs", {"unknown": 1}),
    ("model", 1),
    ("model", ["tiny"]),
]


@pytest.mark.parametrize(("name", "value"), BAD_FIELDS, ids=lambda part: str(part)[:30])
def test_a_bad_field_is_named(server: RunningServer, name: str, value: Any) -> None:
    error = refused(server, json.dumps({"messages": MESSAGES, name: value}).encode())
    assert (error["param"] or "").startswith(name)


def test_a_missing_field_is_named(server: RunningServer) -> None:
    assert refused(server, b"{}")["param"] == "messages"


@pytest.mark.parametrize("name", ["stream_options", "colour", "max_token", "", "ключ"])
def test_an_unknown_field_is_named(server: RunningServer, name: str) -> None:
    if name == "stream_options":
        body = {"messages": MESSAGES, "stream": True, name: {"include_usage": 1}}
        assert refused(server, json.dumps(body).encode())["param"] == "stream_options.include_usage"
    else:
        error = refused(server, json.dumps({"messages": MESSAGES, name: 1}).encode())
        assert (error["param"], error["code"]) == (name, "unknown_parameter")


TOOL = {"type": "function", "function": {"name": "f"}}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("tools", [TOOL]),  # the template has none
        ("response_format", {"type": "json_object"}),
        ("best_of", 2),
        ("guided_json", {}),
        ("thinking_budget", 5),  # the model does not think
        ("store", True),
        ("audio", {}),
    ],
)
def test_what_comes_later_is_refused_by_name(server: RunningServer, name: str, value: Any) -> None:
    error = refused(server, json.dumps({"messages": MESSAGES, name: value}).encode())
    assert (error["param"], error["code"]) == (name, "unsupported_parameter")


@pytest.mark.parametrize(
    "choice", ["auto", "required", {"type": "function", "function": {"name": "f"}}]
)
def test_a_choice_of_tools_needs_tools(server: RunningServer, choice: Any) -> None:
    error = refused(server, json.dumps({"messages": MESSAGES, "tool_choice": choice}).encode())
    assert (error["param"], error["code"]) == ("tool_choice", "invalid_value")
    assert "tools" in error["message"]


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "f"}}])
def test_a_call_that_is_required_comes_later(server: RunningServer, choice: Any) -> None:
    tools = [{"type": "function", "function": {"name": "f"}}]
    body = {"messages": MESSAGES, "tools": tools, "tool_choice": choice}
    error = refused(server, json.dumps(body).encode())
    assert (error["param"], error["code"]) == ("tool_choice", "unsupported_parameter")
    body["tools"] = []
    assert refused(server, json.dumps(body).encode())["code"] == "invalid_value"


def test_nesting_without_end_in_a_field(server: RunningServer) -> None:
    deep: Any = "x"
    for _ in range(500):
        deep = [deep]
    body = json.dumps({"messages": MESSAGES, "chat_template_kwargs": {"a": deep}})
    assert refused(server, body.encode())["param"] == "chat_template_kwargs"


def test_a_prompt_over_the_context_shows_both_numbers(server: RunningServer) -> None:
    response = server.chat("x" * 5000)
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["code"] == "context_length_exceeded"
    assert "5002" in error["message"]
    assert "4096" in error["message"]


def test_prompt_and_max_tokens_over_the_context_shows_both_numbers(server: RunningServer) -> None:
    error = server.chat("x" * 4000, max_tokens=200).json()["error"]
    assert (error["code"], error["param"]) == ("context_length_exceeded", "max_tokens")
    assert "4202" in error["message"]
    assert "4096" in error["message"]


def test_forty_megabytes_are_a_413(server: RunningServer) -> None:
    body = json.dumps({"messages": [{"role": "user", "content": "x" * 40_000_000}]}).encode()
    error = refused(server, body, 413)
    assert "33554432" in error["message"]


def test_a_body_without_announced_length_is_a_413_when_it_grows_too_large(
    server: RunningServer,
) -> None:
    response = server.client.post(CHAT, content=(b"x" * 2**20 for _ in range(40)))
    assert response.status_code == 413
    assert response.json()["error"]["code"] == "request_too_large"


def test_a_413_comes_before_the_body(server: RunningServer) -> None:
    with server.connect() as link:
        link.sendall(http_request(CHAT, b"")[:-4].replace(b"length: 0", b"length: 99999999"))
        link.sendall(b"\r\n\r\n")
        assert b" 413 " in link.recv(65536)


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v1/nothing", 404),
        ("POST", "/", 405),
        ("GET", "/v1", 404),
        ("GET", "/v1/chat/completions", 405),
        ("GET", "/chat/completions/", 405),
        ("POST", "/health", 405),
        ("DELETE", "/v1/models/tiny", 405),
        ("GET", "/v1/models/a/b/../c", 404),
        ("GET", "/v1/models/%ff%00", 404),
    ],
)
def test_what_is_not_served_is_an_error_in_the_same_shape(
    server: RunningServer, method: str, path: str, status: int
) -> None:
    response = server.client.request(method, path)
    assert response.status_code == status
    assert set(response.json()["error"]) == {"message", "type", "param", "code"}


@pytest.mark.parametrize(
    "junk", [b"\x16\x03\x01\x02\x00", b"GET\r\n\r\n", b"hello\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n"]
)
def test_what_is_no_http_is_answered_and_closed(server: RunningServer, junk: bytes) -> None:
    with server.connect() as link:
        link.sendall(junk)
        answer = read_all(link)
    assert answer == b"" or answer.startswith(b"HTTP/1.1 4")


def test_the_server_has_outlived_all_this(server: RunningServer) -> None:
    assert server.chat("alive", max_tokens=6).json()["choices"][0]["message"]["content"] == "alive"
    assert "Traceback" not in server.output()
