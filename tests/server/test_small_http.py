"""What RFC 9110 and RFC 9112 ask for beyond the plain request of a plain client."""

from __future__ import annotations

import json
import time

import pytest

from tests.server.harness import RunningServer, read_all

CHAT = "/v1/chat/completions"
BODY = json.dumps({"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 3}).encode()
STREAM = json.dumps({"prompt": "Hello", "max_tokens": 5, "stream": True}).encode()
LENGTH = b"content-length: %d\r\n\r\n" % len(BODY)
CHUNKED = b"transfer-encoding: chunked\r\n\r\n"
UPGRADES = {
    "h2c": b"connection: Upgrade, HTTP2-Settings\r\nupgrade: h2c\r\nhttp2-settings: AAMAAABkAA\r\n",
    "websocket": b"connection: keep-alive, Upgrade\r\nupgrade: websocket\r\n",
    "two lines": b"Connection: upgrade\r\nconnection: keep-alive\r\nUpgrade: TLS/1.0, h2c\r\n",
}


def head(*, version: bytes = b"1.1", path: str = CHAT, more: bytes = b"") -> bytes:
    first = b"POST " + path.encode() + b" HTTP/" + version + b"\r\nhost: localhost\r\n"
    return first + b"content-type: application/json\r\n" + more


def chunked(body: bytes) -> bytes:
    cut = len(body) // 2
    pieces = [body[:cut], body[cut:], b""]
    return b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces)


def sent(server: RunningServer, *packets: bytes) -> bytes:
    """The answer to packets that arrive one by one, until the server closes."""
    with server.connect() as link:
        for packet in packets:
            link.sendall(packet)
            time.sleep(0.03)
        return read_all(link)


@pytest.mark.parametrize("upgrade", UPGRADES.values(), ids=UPGRADES)
@pytest.mark.parametrize("framing", ["length", "chunked"])
@pytest.mark.parametrize("packets", ["one packet", "two packets", "letter by letter"])
def test_an_upgrade_is_ignored_and_the_connection_stays(
    server: RunningServer, upgrade: bytes, framing: str, packets: str
) -> None:
    begin = head(more=upgrade) + (LENGTH if framing == "length" else CHUNKED)
    body = BODY if framing == "length" else chunked(BODY)
    last = b"GET /livez HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n"
    with server.connect() as link:
        pieces = [begin + body] if packets == "one packet" else [begin, body]
        if packets == "letter by letter":
            pieces = [bytes([letter]) for letter in begin + body]
        for piece in pieces:
            link.sendall(piece)
            time.sleep(0.05 if packets == "two packets" else 0)
        answer = link.recv(65536)
        link.sendall(last)
        answer += read_all(link)
    assert answer.startswith(b"HTTP/1.1 200 OK\r\n"), answer
    assert b'"content":"Hi"' in answer
    assert answer.endswith(b'{"status":"alive"}')


def test_upgrades_in_one_packet_are_answered_in_order(server: RunningServer) -> None:
    one = b"GET /livez HTTP/1.1\r\nhost: localhost\r\n" + UPGRADES["h2c"]
    answer = sent(server, (one + b"\r\n") * 50 + one.replace(b": U", b": close, U") + b"\r\n")
    assert answer.count(b"HTTP/1.1 200 OK") == 51


def test_an_upgrade_with_a_body_that_is_too_long_is_still_a_413(server: RunningServer) -> None:
    request = head(more=UPGRADES["h2c"] + b"content-length: 999999999\r\n\r\n")
    with server.connect() as link:
        link.sendall(request)
        assert link.recv(65536).startswith(b"HTTP/1.1 413 ")


def test_connect_is_refused(server: RunningServer) -> None:
    answer = sent(server, b"CONNECT example.org:443 HTTP/1.1\r\nhost: example.org:443\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 400 ")


@pytest.mark.parametrize("more", [b"", b"connection: keep-alive\r\n", b"expect: 100-continue\r\n"])
def test_a_stream_to_http_1_0_has_no_chunks_and_ends_with_the_connection(
    server: RunningServer, more: bytes
) -> None:
    request = head(version=b"1.0", path="/v1/completions", more=more)
    answer = sent(server, request + b"content-length: %d\r\n\r\n" % len(STREAM) + STREAM)
    first, _, body = answer.partition(b"\r\n\r\n")
    assert first.startswith(b"HTTP/1.1 200 OK")
    assert b"transfer-encoding" not in first.lower()
    assert b"content-length" not in first.lower()
    assert b"connection: close" in first
    lines = body.decode().split("\n\n")
    assert all(line.startswith("data: ") for line in lines[:-1])
    assert lines[-2:] == ["data: [DONE]", ""]


def test_http_1_0_needs_no_host_and_closes_after_a_whole_answer(server: RunningServer) -> None:
    answer = sent(server, b"GET /livez HTTP/1.0\r\n\r\n")
    first, _, body = answer.partition(b"\r\n\r\n")
    assert b"content-length: 18\r\n" in first
    assert body == b'{"status":"alive"}'


def test_an_upgrade_from_http_1_0_is_ignored(server: RunningServer) -> None:
    answer = sent(server, head(version=b"1.0", more=UPGRADES["h2c"]) + LENGTH + BODY)
    assert answer.startswith(b"HTTP/1.1 200 OK")
    assert b'"content":"Hi"' in answer
