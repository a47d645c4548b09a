"""Bodies that are compressed, large, or both."""

from __future__ import annotations

import gzip
import json
import threading
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from tests import fakes
from tests.server.harness import RunningServer, http_request

CHAT = "/v1/chat/completions"
BODY = json.dumps({"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 3}).encode()


def post(server: RunningServer, body: Any, coding: str) -> Any:
    headers = {"content-type": "application/json", "content-encoding": coding}
    return server.client.post(CHAT, content=body, headers=headers)


def pieces(data: bytes) -> Iterator[bytes]:
    yield from (data[at : at + 7] for at in range(0, len(data), 7))


@pytest.mark.parametrize(
    ("coding", "data"),
    [
        ("gzip", gzip.compress(BODY)),
        ("GZIP", gzip.compress(BODY[:9]) + gzip.compress(BODY[9:])),
        ("x-gzip", gzip.compress(BODY)),
        ("deflate", zlib.compress(BODY)),
        ("identity", BODY),
        ("", BODY),
    ],
    ids=["gzip", "members", "x-gzip", "deflate", "identity", "none"],
)
@pytest.mark.parametrize("is_chunked", [False, True])
def test_a_compressed_body_is_read(
    server: RunningServer, coding: str, data: bytes, is_chunked: bool
) -> None:
    answer = post(server, pieces(data) if is_chunked else data, coding)
    assert answer.status_code == 200, answer.text
    assert answer.json()["choices"][0]["message"]["content"] == "Hi"


@pytest.mark.parametrize("coding", ["br", "zstd", "compress", "gzip, gzip", "x"])
def test_another_coding_is_a_415_that_says_what_is_read(server: RunningServer, coding: str) -> None:
    answer = post(server, BODY, coding)
    assert answer.status_code == 415
    assert answer.headers["accept-encoding"] == "gzip, deflate"
    assert answer.json()["error"]["code"] == "unsupported_content_encoding"
    assert coding in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    "data",
    [BODY, gzip.compress(BODY)[:-3], gzip.compress(BODY)[:30], b""],
    ids=["plain", "almost whole", "cut off", "empty"],
)
def test_a_damaged_body_is_a_400(server: RunningServer, data: bytes) -> None:
    answer = post(server, data, "gzip")
    assert answer.status_code == 400
    assert "body" in answer.json()["error"]["message"]


def test_the_connection_stays_after_a_damaged_body(server: RunningServer) -> None:
    post(server, BODY, "gzip")
    assert post(server, gzip.compress(BODY), "gzip").status_code == 200


def test_the_limit_is_of_the_inflated_body(start: Callable[..., Any]) -> None:
    server = start(flags={"--max-request-bytes": "2000"})
    fits = BODY + b" " * (2000 - len(BODY))
    assert post(server, gzip.compress(fits), "gzip").status_code == 200
    answer = post(server, gzip.compress(fits + b" "), "gzip")
    assert answer.status_code == 413
    assert "2000 bytes" in answer.json()["error"]["message"]


def test_a_bomb_is_a_413_and_holds_nobody_up(server: RunningServer) -> None:
    bomb = gzip.compress(bytes(300 * 2**20), 9)
    answer = post(server, bomb, "gzip")
    assert answer.status_code == 413
    assert answer.json()["error"]["code"] == "request_too_large"
    assert server.status("/livez") == 200


def test_a_large_body_is_read(server: RunningServer) -> None:
    """The context that it does not fit is of the model; no limit of the body comes before."""
    messages = [{"role": "user", "content": "x" * 30_000} for _ in range(60)]
    answer = server.client.post(CHAT, json={"messages": messages, "max_tokens": 1}, timeout=120)
    assert answer.json()["error"]["code"] == "context_length_exceeded"
    assert "1800061" in answer.json()["error"]["message"]


def test_what_is_beyond_every_model_is_not_encoded_to_its_end(server: RunningServer) -> None:
    body = {"prompt": "word " * 6_000_000}
    answer = server.client.post("/v1/completions", json=body, timeout=120)
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == "context_length_exceeded"
    assert "of 30000000 characters" in answer.json()["error"]["message"]


def test_what_all_bodies_hold_is_bounded(start: Callable[..., Any]) -> None:
    """Eight of the largest may be held; a small request still gets in."""
    size = 400_000
    server = start(flags={"--max-request-bytes": str(size)})
    held = json.dumps({"prompt": "abc", "seed": fakes.SILENT}).encode()
    held += b" " * (size - len(held))
    with ExitStack() as links:
        for _ in range(9):  # 64 KiB of each count for nothing
            link = links.enter_context(server.connect())
            link.sendall(http_request("/v1/completions", held))
        server.wait_until(lambda: server.health()["num_running"] == 9)
        refused = server.client.post(CHAT, content=BODY + b" " * (size - len(BODY)))
        assert refused.status_code == 429
        assert refused.json()["error"]["code"] == "overloaded"
        assert int(refused.headers["retry-after"]) >= 1
        assert server.client.post(CHAT, content=BODY).status_code == 200
    server.wait_until(server.is_idle)
    assert server.client.post(CHAT, content=BODY + b" " * 300_000).status_code == 200


def test_a_body_of_many_values_holds_nobody_up(start: Callable[..., Any]) -> None:
    server = start()
    body = b'{"prompt":[' + b"[]," * 5_000_000 + b"[]]}"
    codes: list[int] = []
    with server.new_client() as client:
        client.timeout = 120
        asking = threading.Thread(
            target=lambda: codes.append(client.post("/v1/completions", content=body).status_code)
        )
        asking.start()
        num_answers = 0
        while asking.is_alive():
            assert server.client.get("/livez", timeout=2).status_code == 200
            num_answers += 1
        asking.join()
    assert codes == [400]
    assert num_answers > 10
