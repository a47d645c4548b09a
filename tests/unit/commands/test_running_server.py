from __future__ import annotations

import httpx
import pytest

from mlx_lm_server.commands.running_server import RunningServer, UnreachableError, refusal
from mlx_lm_server.errors import ConfigError


@pytest.mark.parametrize(
    ("given", "url"),
    [
        ("http://127.0.0.1:8000", "http://127.0.0.1:8000"),
        ("http://127.0.0.1:8000/v1/", "http://127.0.0.1:8000"),
        ("localhost:8000", "http://localhost:8000"),
        ("https://[::1]:8443/llm/v1", "https://[::1]:8443/llm"),
    ],
)
def test_an_address_is_taken_as_people_write_it(given: str, url: str) -> None:
    assert RunningServer.at(given).url == url


@pytest.mark.parametrize("given", ["", "http://", "ftp://x", "http://x:99999", "http://[::1", "::"])
def test_what_is_no_address_is_told(given: str) -> None:
    with pytest.raises(ConfigError, match="is no address"):
        RunningServer.at(given)


def test_a_key_that_no_header_can_hold_is_told_and_never_shown() -> None:
    with pytest.raises(ConfigError, match="--api-key") as raised:
        RunningServer.at("localhost", "sécret")
    assert "cret" not in str(raised.value)
    assert "geheim" not in repr(RunningServer.at("localhost", "geheim"))


def test_the_key_is_sent_and_no_proxy_stands_before_this_machine(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    with RunningServer.at("127.0.0.1:1", "k").client(1.0) as client:
        assert client.headers["authorization"] == "Bearer k"
        assert not client.trust_env


def test_what_goes_wrong_is_one_line_with_the_systems_words() -> None:
    server = RunningServer.at("localhost:1")
    for error, words in (
        (httpx.ConnectError("[Errno 111] Connection refused"), "(connection refused)"),
        (httpx.ReadTimeout(""), "is silent"),
        (httpx.RemoteProtocolError("peer closed\nearly"), "peer closed early"),
    ):
        with pytest.raises(UnreachableError) as raised, server.translating():
            raise error
        assert words in str(raised.value)
        assert "\n" not in str(raised.value)


def test_a_refusal_has_the_servers_words() -> None:
    body = b'{"error":{"message":"no such\\nmodel"}}'
    assert str(refusal(404, body)) == "no such model (HTTP 404)"
    assert str(refusal(401, b"<html>")) == "no reason is given (HTTP 401); --api-key KEY"
    assert refusal(503, b"[1]").status == 503
