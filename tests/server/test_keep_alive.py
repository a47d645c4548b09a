"""A stream that waits for its first token is not silent."""

from __future__ import annotations

import time
from typing import Any

import openai

from tests import fakes
from tests.observations import observes
from tests.server.harness import RunningServer, http_request, read_all

BODY = b'{"prompt": "abc", "stream": true, "max_tokens": 2, "seed": %d}'


@observes("GenerationConfig.keep_alive_s")
def test_comments_come_until_the_first_token_and_the_sdk_skips_them(start: Any) -> None:
    server = start(flags={"--keep-alive-s": "0.2"}, engine={"rows": 1, "step_s": 0.05})
    with server.connect() as first, server.connect() as second:
        first.sendall(http_request("/v1/completions", BODY.replace(b'": 2', b'": 12') % 1))
        second.sendall(http_request("/v1/completions", BODY % 2, "connection: close"))
        answer = read_all(second)
    head, _, events = answer.partition(b"\r\n\r\n")
    assert b" 200 " in head
    assert events.count(b": keep-alive\n\n") >= 2
    assert events.index(b": keep-alive") < events.index(b"data: ")
    assert events.rindex(b": keep-alive") < events.index(b"data: ")
    assert b"data: [DONE]" in events


def test_comments_come_between_tokens_where_these_give_no_text(start: Any) -> None:
    server = start(flags={"--keep-alive-s": "0.1"}, engine={"step_s": 0.05})
    body = {"prompt": "ab" + "<user>" * 16 + "cd", "max_tokens": 20, "stream": True}
    begun = time.monotonic()
    with server.client.stream("POST", "/v1/completions", json=body) as response:
        lines = [line for line in response.iter_lines() if line]
    most = (time.monotonic() - begun) / 0.1
    texts = [line for line in lines if '"text":"' in line and '"text":""' not in line]
    between = lines[lines.index(texts[0]) : lines.index(texts[-1])]
    assert 2 <= between.count(": keep-alive") <= most
    assert lines[-1] == "data: [DONE]"


def test_an_error_after_a_comment_is_an_event(start: Any) -> None:
    server = start(flags={"--keep-alive-s": "0.05", "--first-token-timeout-s": "0.5"})
    with server.client.stream(
        "POST", "/v1/completions", json={"prompt": "a", "stream": True, "seed": fakes.SILENT}
    ) as response:
        assert response.status_code == 200
        lines = [line for line in response.iter_lines() if line]
    assert lines[0] == ": keep-alive"
    assert "request_timeout" in lines[-2]
    assert lines[-1] == "data: [DONE]"


def test_an_error_without_a_comment_has_its_status(start: Any) -> None:
    server = start(flags={"--keep-alive-s": "0", "--first-token-timeout-s": "0.3"})
    response = server.complete("a", stream=True, seed=fakes.SILENT)
    assert response.status_code == 408


def test_a_client_that_leaves_while_it_waits_is_noticed(start: Any) -> None:
    server = start(flags={"--keep-alive-s": "0.05"})
    with server.connect() as link:
        link.sendall(http_request("/v1/completions", BODY % fakes.SILENT))
        assert b"keep-alive" in link.recv(65536) + link.recv(65536)
    server.wait_until(server.is_idle)


def test_a_prompt_that_comes_further_does_not_run_into_the_limit_of_its_first_token(
    start: Any,
) -> None:
    """Its three steps take longer than the limit, none of them does."""
    server = start(flags={"--first-token-timeout-s": "1.8"}, engine={"step_s": 0.8})
    body = {"prompt": "abcd", "return_progress": True, "max_tokens": 1}
    events = server.events("/v1/completions", **body)
    assert events[0]["prompt_progress"]["processed"] in (2, 4)
    assert events[-2]["choices"][0]["finish_reason"] == "length"


def test_the_sdk_reads_progress(server: RunningServer) -> None:
    sdk = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
    stream = sdk.chat.completions.create(
        model="tiny",
        messages=[{"role": "user", "content": "abc"}],
        max_tokens=3,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"return_progress": True},
    )
    chunks = list(stream)
    told = [(c.model_extra or {}).get("prompt_progress") for c in chunks]
    assert [one["processed"] for one in told if one][-1] == 5  # <user>abc<assistant>
    assert all(told[: told.index(None)])
