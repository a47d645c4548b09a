"""What a browser sends for a page that is not asked for never reaches the model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from tests.observations import observes
from tests.server.harness import RunningServer, read_all

CHAT = "/v1/chat/completions"
BODY = json.dumps({"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 3}).encode()
JSON, TEXT = {"content-type": "application/json"}, {"content-type": "text/plain"}
FORM = {"content-type": "application/x-www-form-urlencoded"}
EVIL = "https://evil.example"


def get(server: RunningServer, host: str, path: str = "/v1/models") -> httpx.Response:
    return server.client.get(path, headers={"host": host})


def post(server: RunningServer, **headers: str) -> httpx.Response:
    given = {name.replace("_", "-"): value for name, value in headers.items()}
    return server.client.post(CHAT, content=BODY, headers=given)


def refusal(response: httpx.Response, status: int, code: str) -> str:
    """The message of an error object."""
    error = response.json()["error"]
    assert (response.status_code, error["code"]) == (status, code), response.text
    return str(error["message"])


@pytest.mark.parametrize(
    "host",
    [
        "localhost",
        "localhost:1",
        "LOCALHOST:8000",
        "localhost.",
        "llm.localhost:8000",
        "127.0.0.1",
        "127.9.9.9:8000",
        "[::1]",
        "[::1]:8000",
        "[::ffff:127.0.0.1]:8000",
    ],
)
def test_names_of_this_machine_are_answered(server: RunningServer, host: str) -> None:
    assert get(server, host).status_code == 200


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "evil.example:8000",
        "localhost.evil.example",
        "evillocalhost",
        "127.0.0.1.evil.example",
        "10.0.0.1",
        "0.0.0.0:8000",
        "[fe80::1]:8000",
        "llm.local",
        "",
    ],
)
@pytest.mark.parametrize("path", ["/v1/models", "/v1/cache/explain", "/health", "/metrics", "/x"])
def test_a_rebound_name_reads_nothing(server: RunningServer, host: str, path: str) -> None:
    message = refusal(get(server, host, path), 403, "host_not_allowed")
    assert f"Host: {host}" in message
    assert "--allowed-hosts" in message


def test_a_rebound_name_starts_nothing(server: RunningServer) -> None:
    headers = {"host": "evil.example", "origin": "http://evil.example", **JSON}
    response = server.client.post(CHAT, content=BODY, headers=headers)
    refusal(response, 403, "host_not_allowed")


@pytest.mark.parametrize("host", ["a b", "localhost@evil.example", "localhost/x", "::1", "[::1"])
def test_a_host_that_is_none_is_a_400(server: RunningServer, host: str) -> None:
    assert get(server, host).status_code == 400


@pytest.mark.parametrize("hosts", [b"", b"host: localhost\r\nhost: localhost\r\n"])
def test_http_1_1_has_one_host(server: RunningServer, hosts: bytes) -> None:
    with server.connect() as link:
        link.sendall(b"GET /livez HTTP/1.1\r\n" + hosts + b"connection: close\r\n\r\n")
        answer = read_all(link)
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert b"header" in answer
    assert b"Host" in answer


@observes("ServerConfig.allowed_hosts")
def test_allowed_hosts_are_more_names(start: Callable[..., Any]) -> None:
    server = start(flags={"--allowed-hosts": ["llm.example", "10.0.0.1"]})
    assert get(server, "llm.example:443").status_code == 200
    assert get(server, "10.0.0.1").status_code == 200
    assert get(server, "localhost").status_code == 200
    refusal(get(server, "www.llm.example"), 403, "host_not_allowed")


def test_every_host_can_be_allowed(start: Callable[..., Any]) -> None:
    server = start(flags={"--allowed-hosts": ["*"]})
    assert get(server, "evil.example").status_code == 200


def test_with_a_key_any_host_will_do(start: Callable[..., Any]) -> None:
    server = start(flags={"--api-key": "sesame"})
    server.client.headers["authorization"] = "Bearer sesame"
    assert get(server, "llm.example").status_code == 200
    assert post(server, origin=EVIL, **JSON).status_code == 200


def test_with_a_key_named_hosts_are_the_only_ones(start: Callable[..., Any]) -> None:
    server = start(flags={"--api-key": "sesame", "--allowed-hosts": ["llm.example"]})
    server.client.headers["authorization"] = "Bearer sesame"
    assert get(server, "llm.example").status_code == 200
    refusal(get(server, "other.example"), 403, "host_not_allowed")


def test_an_open_address_is_asked_for_by_any_name_but_pages_stay_out(
    start: Callable[..., Any],
) -> None:
    server = start(flags={"--host": "0.0.0.0", "--allow-unauthenticated": True})
    assert get(server, "llm.lan:8000").status_code == 200
    refusal(post(server, origin=EVIL, **JSON), 403, "origin_not_allowed")
    own = {"host": "llm.lan:8000", "origin": "http://llm.lan:8000", **JSON}
    assert post(server, **own).status_code == 200


def test_behind_a_unix_socket_any_host_will_do(start: Callable[..., Any], tmp_path: Path) -> None:
    path = str(tmp_path / "s.sock")
    server = start(flags={"--uds": path}, uds=path)
    assert get(server, "whatever.example").status_code == 200


PAGES = {
    "a page": {"origin": EVIL},
    "a page, told so": {"origin": EVIL, "sec_fetch_site": "cross-site"},
    "no origin shown": {"sec_fetch_site": "cross-site"},
    "of another port": {"origin": "http://localhost:3000", "sec_fetch_site": "same-site"},
    "of another port, old browser": {"origin": "http://127.0.0.1:3000"},
    "no page's origin": {"origin": "null"},
    "no page's origin, told so": {"origin": "null", "sec_fetch_site": "cross-site"},
    "an extension": {"origin": "chrome-extension://abcdef"},
    "nonsense": {"origin": "x"},
}


@pytest.mark.parametrize("page", PAGES.values(), ids=PAGES)
@pytest.mark.parametrize("kind", [{}, TEXT, FORM, JSON], ids=["none", "text", "form", "json"])
def test_a_foreign_page_starts_nothing(
    server: RunningServer, page: dict[str, str], kind: dict[str, str]
) -> None:
    message = refusal(post(server, **page, **kind), 403, "origin_not_allowed")
    assert "--cors-origins" in message
    assert page.get("origin", "cross-site") in message


def test_a_foreign_page_reads_nothing(server: RunningServer) -> None:
    response = server.client.get("/v1/models", headers={"origin": EVIL})
    assert "access-control-allow-origin" not in response.headers
    asking = {"origin": EVIL, "access-control-request-method": "POST"}
    assert server.client.options(CHAT, headers=asking).status_code == 405


def test_a_page_of_the_server_itself_may(server: RunningServer) -> None:
    assert post(server, origin=server.url, **JSON).status_code == 200
    assert post(server, origin=server.url, sec_fetch_site="same-origin", **JSON).status_code == 200
    own = {"host": "localhost", "origin": "http://localhost", **JSON}
    assert post(server, **own).status_code == 200


def test_a_page_behind_a_proxy_of_its_own_origin_may(server: RunningServer) -> None:
    headers = {"origin": "https://llm.example", "sec_fetch_site": "same-origin", **JSON}
    assert post(server, **headers).status_code == 200


@pytest.mark.parametrize("kind", [{}, TEXT, FORM], ids=["none", "text", "form"])
def test_also_an_allowed_page_sends_json(server: RunningServer, kind: dict[str, str]) -> None:
    message = refusal(post(server, origin=server.url, **kind), 415, "unsupported_media_type")
    assert "application/json" in message


@pytest.mark.parametrize(
    "kind",
    [
        "application/json",
        "Application/JSON; charset=utf-8",
        "application/vnd.api+json",
        "application/x-www-form-urlencoded",  # curl -d
        "",
    ],
)
def test_what_a_client_may_say_of_json(server: RunningServer, kind: str) -> None:
    headers = {"content_type": kind} if kind else {}
    assert post(server, **headers).status_code == 200


@pytest.mark.parametrize("kind", ["text/plain", "multipart/form-data; boundary=x", "text/json"])
def test_what_is_no_json_is_a_415(server: RunningServer, kind: str) -> None:
    response = post(server, content_type=kind)
    message = refusal(response, 415, "unsupported_media_type")
    assert kind in message
    assert response.headers["accept"] == "application/json"


@observes("ServerConfig.cors_origins")
def test_cors_origins_are_pages_that_may(start: Callable[..., Any]) -> None:
    server = start(flags={"--cors-origins": ["http://localhost:3000", "null"]})
    for origin in ("http://localhost:3000", "null"):
        response = post(server, origin=origin, sec_fetch_site="cross-site", **JSON)
        assert response.status_code == 200
        assert response.headers["access-control-allow-origin"] == origin
    refused = post(server, origin=EVIL, sec_fetch_site="cross-site", **JSON)
    refusal(refused, 403, "origin_not_allowed")
    assert "access-control-allow-origin" not in refused.headers
    refusal(post(server, sec_fetch_site="cross-site"), 403, "origin_not_allowed")


def test_every_page_can_be_allowed(start: Callable[..., Any]) -> None:
    server = start(flags={"--cors-origins": ["*"]})
    assert post(server, origin=EVIL, sec_fetch_site="cross-site", **JSON).status_code == 200
    assert post(server, origin="null", **JSON).status_code == 200
    refusal(get(server, "evil.example"), 403, "host_not_allowed")


def test_the_sdk_is_no_page(server: RunningServer) -> None:
    sdk = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
    assert sdk.models.list().data[0].id == "tiny"


@pytest.mark.parametrize(
    "origin", ["localhost", "http://localhost:3000/", "https://*.example.com", "http://A.example"]
)
def test_an_origin_that_matches_no_page_stops_the_start(
    start: Callable[..., Any], origin: str
) -> None:
    server = start(wait=False, flags={"--cors-origins": [origin]})
    assert server.process.wait(30) == 2
    assert "an origin looks like http://localhost:3000" in server.output()
