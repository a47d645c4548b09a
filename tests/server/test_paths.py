"""Where clients look for things, and where they are told to look."""

from __future__ import annotations

from typing import Any

import httpx
import openai
import pytest

from tests.server.harness import RunningServer

MESSAGES = [{"role": "user", "content": "Hi"}]


@pytest.mark.parametrize(
    "path",
    [
        "/v1/chat/completions",
        "/v1/chat/completions/",
        "/chat/completions",
        "/chat/completions/",
        "//v1/chat/completions",
        "//chat//completions//",
    ],
)
def test_a_chat_is_answered_with_and_without_v1(server: RunningServer, path: str) -> None:
    answer = server.client.post(server.url + path, json={"messages": MESSAGES, "max_tokens": 3})
    assert answer.status_code == 200
    assert answer.json()["choices"][0]["message"]["content"] == "Hi"


def test_completions_are_answered_without_v1(server: RunningServer) -> None:
    answer = server.client.post("/completions", json={"prompt": "Hi", "max_tokens": 2})
    assert answer.json()["choices"][0]["text"] == "Hi"


@pytest.mark.parametrize(
    "path", ["/models", "/models/", "/v1/models/", "/models/tiny", "/v1/models/tiny/", "/health/"]
)
def test_what_is_read_is_the_same_by_each_path(server: RunningServer, path: str) -> None:
    plain = path.rstrip("/")
    known = plain if plain.startswith(("/v1", "/health")) else "/v1" + plain
    one, other = server.client.get(path), server.client.get(known)
    assert one.status_code == other.status_code == 200
    assert one.json().keys() == other.json().keys()


@pytest.mark.parametrize("base", ["", "/", "/v1", "/v1/"])
def test_the_sdk_works_with_each_base_url(server: RunningServer, base: str) -> None:
    sdk = openai.OpenAI(base_url=server.url + base, api_key="none", max_retries=0)
    assert sdk.models.retrieve("tiny").id == "tiny"
    answer = sdk.completions.create(model="tiny", prompt="Hi", max_tokens=2)
    assert answer.choices[0].text == "Hi"


def test_a_path_with_a_slash_needs_no_key_where_the_path_needs_none(start: Any) -> None:
    server = start(flags={"--api-key": "sesame"})
    assert server.client.get("/health/").status_code == 200
    for path in ("/models", "/v1/models/", "//models", "/health/x"):
        assert server.client.get(server.url + path).status_code == 401


PATHS = ("/", "/health", "/livez", "/readyz", "/metrics", "/docs", "/openapi.json", "/v1/models")


@pytest.mark.parametrize("path", [*PATHS, "/models", "/v1/models/tiny"])
def test_head_is_get_without_its_body(server: RunningServer, path: str) -> None:
    head, get = server.client.head(path), server.client.get(path)
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["content-type"] == get.headers["content-type"]
    if path != "/metrics":
        assert head.headers["content-length"] == str(len(get.content))


def message(response: httpx.Response, status: int) -> str:
    assert response.status_code == status
    return str(response.json()["error"]["message"])


@pytest.mark.parametrize(
    ("path", "near"),
    [
        ("/v1/v1/chat/completions", "/v1/chat/completions"),
        ("/api/v1/chat/completions", "/v1/chat/completions"),
        ("/v1/chat/completion", "/v1/chat/completions"),
        ("/v1/model", "/v1/models"),
        ("/healthz", "/health"),
        ("/doc", "/docs"),
        ("/v1/tokenize", "/tokenize"),
    ],
)
def test_an_unknown_path_is_told_the_nearest(server: RunningServer, path: str, near: str) -> None:
    assert f"`{near}`" in message(server.client.post(path), 404)


def test_a_path_like_none_is_told_where_all_are(server: RunningServer) -> None:
    assert message(server.client.get("/qqq"), 404) == (
        "GET /qqq is not served here; all are listed at `/docs`"
    )


def test_a_wrong_method_is_told_the_right_ones(server: RunningServer) -> None:
    wrong = server.client.get("/chat/completions")
    assert wrong.headers["allow"] == "POST"
    assert "POST" in message(wrong, 405)
    wrong = server.client.delete("/v1/models")
    assert wrong.headers["allow"] == "GET, HEAD"
    assert "GET, HEAD" in message(wrong, 405)


def test_each_path_stands_in_the_document_once(server: RunningServer) -> None:
    paths = server.client.get("/openapi.json").json()["paths"]
    assert "/v1/models" in paths
    assert "/models" not in paths


def test_the_front_says_what_this_is_and_where_to_go_on(start: Any) -> None:
    server = start(flags={"--api-key": "sesame"})
    found = server.client.get("/").json()
    assert found["name"] == "mlx-lm-server"
    for name in ("docs", "openapi", "health", "metrics"):
        assert server.client.get(found[name]).status_code == 200
    assert server.client.get(found["models"]).status_code == 401


def test_the_front_is_a_page_in_a_browser(server: RunningServer) -> None:
    accept = "text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8"
    page = server.client.get("/", headers={"accept": accept})
    assert page.headers["content-type"].startswith("text/html")
    assert page.headers["vary"] == "accept"
    assert "mlx-lm-server" in page.text
    for path in ("/docs", "/v1/models", "/health"):
        assert f"<a href={path}>" in page.text
