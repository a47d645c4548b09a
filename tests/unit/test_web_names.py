"""Origins and hosts: what a browser can send, and what it cannot."""

from __future__ import annotations

import pytest

from mlx_lm_server.web_names import (
    host_fault,
    is_loopback,
    is_loopback_name,
    origin_fault,
    split_authority,
    split_origin,
)


@pytest.mark.parametrize(
    "origin",
    [
        "*",
        "null",
        "http://localhost:3000",
        "http://localhost",
        "http://127.0.0.1:8080",
        "https://app.example",
        "https://xn--bcher-kva.example",
        "http://[::1]:3000",
        "http://my_host:1",
        "https://example.com.",
        "http://example.com:443",
        "chrome-extension://abcdefghijklmnop",
        "app://obsidian.md",
    ],
)
def test_what_is_an_origin(origin: str) -> None:
    assert origin_fault(origin) is None


@pytest.mark.parametrize(
    ("origin", "reason"),
    [
        ("localhost", "no scheme"),
        ("localhost:3000", "no scheme"),
        ("example.com", "no scheme"),
        ("", "no scheme"),
        ("Null", "no scheme"),
        ("//localhost", "no scheme"),
        ("http://localhost:3000/", "slash"),
        ("http://localhost/app", "slash"),
        ("file:///", "slash"),
        ("https://*.example.com", "pattern"),
        ("*.example.com", "pattern"),
        ("http://localhost:*", "pattern"),
        ("http://a,http://b", "several"),
        ("http://Localhost:3000", "lower case"),
        ("HTTP://localhost:3000", "lower case"),
        ("https://bücher.example", "ASCII"),
        ("http://localhost:80", "leave out the port 80"),
        ("https://example.com:443", "leave out the port 443"),
        ("http://localhost:", "no port"),
        ("http://localhost:03000", "no port"),
        ("http://localhost:65536", "no port"),
        ("http://localhost:x", "SCHEME://HOST"),
        ("http://", "SCHEME://HOST"),
        ("http://user@localhost", "no name"),
        ("http://local host", "no name"),
        ("http://localhost?x", "no name"),
        ("http://localhost#x", "no name"),
        ("http://a..b", "no name"),
        ("http://127.1", "IPv4"),
        ("http://127.0.0.01", "IPv4"),
        ("http://::1", "SCHEME://HOST"),
        ("http://[0:0:0:0:0:0:0:1]", "IPv6"),
        ("http://[::g]", "IPv6"),
    ],
)
def test_what_matches_no_page(origin: str, reason: str) -> None:
    fault = origin_fault(origin)
    assert fault is not None
    assert reason in fault
    assert "http://localhost:3000" in fault


@pytest.mark.parametrize(
    "host", ["*", "llm", "llm.example", "host.docker.internal", "10.0.0.1", "fd00::1"]
)
def test_what_is_a_host(host: str) -> None:
    assert host_fault(host) is None


@pytest.mark.parametrize(
    "host",
    ["", "http://llm", "llm:8000", "*.example", "LLM", "llm/", "[fd00::1]", "a b", "1.2.3", "llm."],
)
def test_what_is_no_host(host: str) -> None:
    assert host_fault(host) is not None


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("localhost", ("localhost", None)),
        ("LocalHost.:8000", ("localhost", "8000")),
        ("localhost:", ("localhost", None)),
        ("[::1]:8000", ("::1", "8000")),
        ("127.0.0.1:80", ("127.0.0.1", "80")),
        ("", ("", None)),
        ("evil.example", ("evil.example", None)),
        ("::1", None),
        ("localhost@evil.example", None),
        ("localhost/x", None),
        ("localhost:80:80", None),
        ("localhost evil", None),
        ("[::1", None),
    ],
)
def test_a_host_and_its_port(text: str, parts: tuple[str, str | None] | None) -> None:
    assert split_authority(text) == parts


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("http://localhost:8000", ("localhost", "8000")),
        ("http://localhost", ("localhost", "80")),
        ("https://llm.example", ("llm.example", "443")),
        ("app://obsidian.md", ("obsidian.md", None)),
        ("null", None),
        ("", None),
        ("file://", None),
    ],
)
def test_the_host_of_an_origin(text: str, parts: tuple[str, str | None] | None) -> None:
    assert split_origin(text) == parts


@pytest.mark.parametrize("host", ["127.0.0.1", "127.9.9.9", "::1", "localhost", "::ffff:127.0.0.1"])
def test_loopback(host: str) -> None:
    assert is_loopback(host)
    assert is_loopback_name(host)


@pytest.mark.parametrize(
    "host",
    ["0.0.0.0", "::", "10.0.0.1", "example.org", "", "localhost.evil.example", "alocalhost"],
)
def test_not_loopback(host: str) -> None:
    assert not is_loopback(host)
    assert not is_loopback_name(host)


def test_names_under_localhost_are_of_this_machine() -> None:
    assert is_loopback_name("llm.localhost")
    assert not is_loopback("llm.localhost")
