"""/openapi.json says what the server does: schemathesis asks for what it allows and for what it
forbids, and answers are held against it."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema_rs
import pytest

from tests.observations import observes
from tests.server.harness import RunningServer
from tests.server.test_tools import SAID, TEMPLATE, TOOL

FLAGS = {
    "--chat-template": TEMPLATE,
    "--served-model-name": ["tiny"],
    # so that nothing that is asked for takes long
    "--max-generation-tokens": "500",
    "--default-max-tokens": "4",
}
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"


@pytest.fixture(scope="module")
def served(model: Path) -> Iterator[RunningServer]:
    server = RunningServer(model, flags=FLAGS, engine={"ignores_seeds": 1}).start()
    yield server
    assert server.is_running
    server.stop()


@pytest.fixture(scope="module")
def document(served: RunningServer) -> dict[str, Any]:
    found: dict[str, Any] = served.client.get("/openapi.json").json()
    return found


@pytest.mark.timeout(300)
def test_nothing_that_is_asked_fails_or_hangs(served: RunningServer, tmp_path: Path) -> None:
    """About 2000 requests: no 500, no answer within 10 s missing, no status, type or body that the
    document does not name, and nothing taken that it forbids. What types cannot say (a field that
    needs another) may be refused."""
    done = subprocess.run(
        [
            *(sys.executable, "-m", "schemathesis.cli", "run", f"{served.url}/openapi.json"),
            *("--phases=coverage,fuzzing", "--max-examples=20", "--seed=1", "--no-color"),
            *("--exclude-checks=positive_data_acceptance", "--suppress-health-check=all"),
            "--request-timeout=10",
        ],
        capture_output=True,
        text=True,
        timeout=270,  # about 12 s where nothing else runs
        cwd=tmp_path,  # it leaves a folder behind
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    [num_passed] = re.findall(r"(\d+) generated, \d+ passed", done.stdout)
    assert int(num_passed) > 1000
    served.wait_until(served.is_idle)


def test_every_field_has_a_type_and_a_description(document: dict[str, Any]) -> None:
    for name, schema in document["components"]["schemas"].items():
        for field, one in schema["properties"].items():
            assert one.get("description"), f"{name}.{field}"
            assert one.keys() & {"type", "anyOf", "$ref", "enum", "const"}, f"{name}.{field}"


def checked(document: dict[str, Any], path: str, value: Any, *, is_event: bool = False) -> None:
    """Raises where the document says something else of an answer."""
    content = document["paths"][path]["post"]["responses"]["200"]["content"]
    if is_event:
        event = content["text/event-stream"]["schema"]
        schema = event["properties"]["data"]["anyOf"][0]["contentSchema"]
    else:
        schema = content["application/json"]["schema"]
    jsonschema_rs.validate({**schema, "components": document["components"]}, value)


MESSAGES = [{"role": "user", "content": SAID + "<eos>"}]
RICH: list[tuple[str, dict[str, Any]]] = [
    (CHAT, {"messages": MESSAGES}),
    (CHAT, {"messages": MESSAGES, "tools": [TOOL], "timings": True, "metadata": {"a": "b"}}),
    (CHAT, {"messages": MESSAGES, "tools": [TOOL], "logprobs": True, "top_logprobs": 3, "n": 2}),
    (CHAT, {"messages": [{"role": "user", "content": "<tool_call>oops<eos>"}], "tools": [TOOL]}),
    (CHAT, {"messages": MESSAGES, "prompt_logprobs": 2}),
    (COMPLETIONS, {"prompt": "abc", "prompt_logprobs": 0, "logprobs": 1, "echo": True}),
    (COMPLETIONS, {"prompt": ["a", "b"], "n": 2, "metadata": {"a": "b"}}),
    (COMPLETIONS, {"prompt": "abc", "logprobs": 2, "echo": True, "timings": True}),
]


@pytest.mark.parametrize(("path", "body"), RICH, ids=lambda part: str(part)[:60])
def test_answers_are_as_the_document_says(
    served: RunningServer, document: dict[str, Any], path: str, body: dict[str, Any]
) -> None:
    body = {"max_tokens": 300, **body}
    answer = served.client.post(path, json=body)
    assert answer.status_code == 200, answer.text
    checked(document, path, answer.json())
    body = {"return_progress": True, **body}
    if "prompt_logprobs" in body:  # not in a stream
        return
    events = served.events(path, stream_options={"include_usage": True}, **body)
    assert events.pop() == "[DONE]"
    assert events[-1]["usage"]
    for event in events:
        checked(document, path, event, is_event=True)


def test_the_page_needs_no_other_host_and_no_script(
    served: RunningServer, document: dict[str, Any]
) -> None:
    page = served.client.get("/docs")
    assert page.headers["content-type"].startswith("text/html")
    assert "<script" not in page.text
    assert not re.search(r"(?:src|href)=['\"]?(?:https?:)?//", page.text)
    for path in document["paths"]:
        assert path in page.text
    for schema in document["components"]["schemas"].values():
        for field in schema["properties"]:
            assert f"<code>{field}</code>" in page.text


@observes("ServerConfig.api_key")
def test_the_document_is_open_and_the_rest_is_not(start: Any) -> None:
    server = start(flags={"--api-key": "sesame"})
    document = server.client.get("/openapi.json").json()
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            answer = server.client.request(method, path.replace("{id}", "x"))
            assert (answer.status_code == 401) == (operation["security"] != [])


def test_a_wrong_method_is_told_the_right_one(served: RunningServer) -> None:
    response = served.client.get(CHAT)
    assert response.status_code == 405
    assert response.headers["allow"] == "POST"
