"""Clients that leave, dawdle or say only half of it."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from tests import fakes
from tests.server.harness import RunningServer, http_request, read_all

CHAT = "/v1/chat/completions"


def body(text: str = "abc", **fields: Any) -> bytes:
    message = {"role": "user", "content": text}
    return json.dumps({"messages": [message], **fields}).encode()


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_gives_its_row_back(server: RunningServer, stream: bool) -> None:
    with server.connect() as link:
        link.sendall(http_request(CHAT, body(stream=stream, max_tokens=4000)))
        server.wait_until(lambda: server.health()["num_running"] == 1)
        if stream:
            assert b"200 OK" in link.recv(100)
    server.wait_until(server.is_idle, limit_s=1)


def test_a_client_that_leaves_while_it_waits_gives_its_place_back(server: RunningServer) -> None:
    with server.connect() as link:
        link.sendall(http_request(CHAT, body(seed=fakes.SILENT)))
        server.wait_until(lambda: server.health()["num_running"] == 1)
    server.wait_until(server.is_idle, limit_s=1)


def test_a_client_that_leaves_in_the_middle_of_its_body_costs_nothing(
    server: RunningServer,
) -> None:
    with server.connect() as link:
        link.sendall(http_request(CHAT, body())[:-10])
        time.sleep(0.05)
    assert server.chat("x", max_tokens=1).status_code == 200
    assert server.is_idle()


def test_every_prompt_of_a_list_is_cancelled(server: RunningServer) -> None:
    request = json.dumps({"prompt": ["a", "b", "c"], "max_tokens": 4000, "stream": True}).encode()
    with server.connect() as link:
        link.sendall(http_request("/v1/completions", request))
        server.wait_until(lambda: server.health()["num_running"] == 3)
    server.wait_until(server.is_idle, limit_s=1)


def test_others_notice_nothing(server: RunningServer) -> None:
    text = "x" * 200
    with server.new_client() as other:
        request = {"prompt": text, "max_tokens": 200, "stream": True}
        with other.stream("POST", "/v1/completions", json=request) as response:
            for _ in range(5):
                with server.connect() as link:
                    link.sendall(http_request(CHAT, body(stream=True, max_tokens=4000)))
                    link.recv(10)
            lines = [line for line in response.iter_lines() if line]
    assert lines[-1] == "data: [DONE]"
    said = "".join(json.loads(line[6:])["choices"][0]["text"] for line in lines[:-1])
    assert said == text
    server.wait_until(server.is_idle, limit_s=1)


@pytest.fixture(scope="module")
def impatient(model: Path) -> Iterator[RunningServer]:
    server = RunningServer(
        model,
        connection={"head_s": 0.3, "body_s": 0.3, "discarded_body_s": 0.6, "write_s": 0.3},
        engine={"step_s": 0.0005},
    ).start()
    yield server
    server.stop()


def test_half_a_head_is_cut_off(impatient: RunningServer) -> None:
    with impatient.connect() as link:
        link.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\n")
        assert read_all(link).startswith(b"HTTP/1.1 408 ")


def test_silence_is_cut_off(impatient: RunningServer) -> None:
    with impatient.connect() as link:
        assert read_all(link) == b""


def test_a_head_that_trickles_is_cut_off(impatient: RunningServer) -> None:
    with impatient.connect() as link:
        started_s = time.monotonic()
        try:
            for letter in b"GET / HTTP/1.1\r\nx: " + b"y" * 100:
                link.sendall(bytes([letter]))
                time.sleep(0.02)
        except OSError:
            pass
        assert time.monotonic() - started_s < 1.5


def test_half_a_head_on_a_kept_connection_is_cut_off(impatient: RunningServer) -> None:
    with impatient.connect() as link:
        link.sendall(b"GET /livez HTTP/1.1\r\nhost: localhost\r\n\r\nGET /livez HT")
        assert read_all(link).count(b"HTTP/1.1 ") == 2


def test_a_head_without_end_is_refused(impatient: RunningServer) -> None:
    with impatient.connect() as link:
        with suppress(OSError):
            link.sendall(b"GET / HTTP/1.1\r\nx: " + b"y" * 200_000)
        assert read_all(link)[:12] in (b"HTTP/1.1 431", b"")
    assert impatient.status("/livez") == 200


def test_half_a_body_is_a_408(impatient: RunningServer) -> None:
    with impatient.connect() as link:
        link.sendall(http_request(CHAT, body())[:-5])
        answer = read_all(link)
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert b"request_timeout" in answer


def test_a_client_that_reads_nothing_is_cut_off_and_others_are_served(
    impatient: RunningServer,
) -> None:
    with impatient.connect() as link:
        prompts = ["\n" * 2000] * 32  # many sequences at once fill every buffer
        request = json.dumps({"prompt": prompts, "max_tokens": 2000, "stream": True}).encode()
        link.sendall(http_request("/v1/completions", request))
        impatient.wait_until(lambda: impatient.health()["num_running"] > 0)
        assert impatient.chat("hi", max_tokens=3).status_code == 200
        impatient.wait_until(impatient.is_idle)
        read_all(link)
    assert impatient.chat("hi", max_tokens=3).status_code == 200
