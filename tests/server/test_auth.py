"""Who may use the server."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.observations import observes
from tests.server.harness import RunningServer, http_request


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("keys") / "keys.txt"


@pytest.fixture(scope="module")
def guarded(model: Path, keys: Path) -> Iterator[RunningServer]:
    keys.write_text("# people\nalpha-key alice\n\nbeta-key\n")
    server = RunningServer(
        model,
        flags={"--api-key-file": str(keys), "--cors-origins": ["https://app.example"]},
        env={"MLX_LM_SERVER_API_KEY": "main-key"},
    ).start()
    yield server
    server.stop()


def status(server: RunningServer, header: str | None) -> int:
    headers = {} if header is None else {"authorization": header}
    return server.client.get("/v1/models", headers=headers).status_code


@pytest.mark.parametrize("key", ["main-key", "alpha-key", "beta-key"])
def test_each_key_opens_the_door(guarded: RunningServer, key: str) -> None:
    assert status(guarded, f"Bearer {key}") == 200
    assert status(guarded, f"bearer {key}") == 200


@pytest.mark.parametrize(
    "header",
    [None, "", "Bearer", "Bearer wrong", "main-key", "Basic main-key", "Bearer alice"],
)
def test_anything_else_does_not(guarded: RunningServer, header: str | None) -> None:
    assert status(guarded, header) == 401


def test_the_refusal_is_the_sdks_authentication_error(guarded: RunningServer) -> None:
    sdk = openai.OpenAI(base_url=f"{guarded.url}/v1", api_key="wrong", max_retries=0)
    with pytest.raises(openai.AuthenticationError) as caught:
        sdk.models.list()
    assert caught.value.code == "invalid_api_key"


def test_a_body_is_not_read_before_the_key_is_known(guarded: RunningServer) -> None:
    with guarded.connect() as link:
        link.sendall(http_request("/v1/chat/completions", b"x" * 1000)[:-900])
        assert b" 401 " in link.recv(1000)


@pytest.mark.parametrize("path", ["/health", "/livez", "/readyz", "/metrics"])
def test_probes_need_no_key(guarded: RunningServer, path: str) -> None:
    assert guarded.status(path) == 200


def test_an_unknown_path_tells_nothing_without_a_key(guarded: RunningServer) -> None:
    assert guarded.status("/secret") == 401


@observes("ServerConfig.cors_origins")
def test_a_page_of_a_named_origin_may_call(guarded: RunningServer) -> None:
    preflight = guarded.client.options(
        "/v1/chat/completions",
        headers={"origin": "https://app.example", "access-control-request-method": "POST"},
    )
    assert preflight.status_code == 200
    assert preflight.headers["access-control-allow-origin"] == "https://app.example"
    refused = guarded.client.get("/v1/models", headers={"origin": "https://app.example"})
    assert refused.status_code == 401
    assert refused.headers["access-control-allow-origin"] == "https://app.example"


def test_a_page_of_another_origin_may_not(guarded: RunningServer) -> None:
    headers = {"origin": "https://evil.example", "authorization": "Bearer main-key"}
    response = guarded.client.get("/v1/models", headers=headers)
    assert "access-control-allow-origin" not in response.headers


def test_sighup_reads_the_keys_again_and_keeps_the_old_ones_if_it_cannot(
    guarded: RunningServer, keys: Path
) -> None:
    keys.write_text("gamma-key\n")
    os.kill(guarded.process.pid, signal.SIGHUP)
    guarded.wait_until(lambda: status(guarded, "Bearer gamma-key") == 200)
    assert status(guarded, "Bearer alpha-key") == 401
    assert status(guarded, "Bearer main-key") == 200
    keys.write_text("")
    os.kill(guarded.process.pid, signal.SIGHUP)
    guarded.wait_until(lambda: "the old keys stay" in guarded.output())
    assert status(guarded, "Bearer gamma-key") == 200


def test_keys_are_never_logged(guarded: RunningServer) -> None:
    output = guarded.output()
    assert not any(key in output for key in ("main-key", "alpha-key", "beta-key", "gamma-key"))


def test_an_open_address_without_a_key_is_refused(start: Callable[..., Any]) -> None:
    server = start(wait=False, flags={"--host": "0.0.0.0"})
    assert server.process.wait(30) == 2
    assert "open to the network" in server.output()


@observes("ServerConfig.allow_unauthenticated")
def test_an_open_address_without_a_key_can_be_insisted_on(start: Callable[..., Any]) -> None:
    server = start(flags={"--host": "0.0.0.0", "--allow-unauthenticated": True})
    assert status(server, None) == 200


def test_without_a_key_nobody_is_asked(server: RunningServer) -> None:
    assert status(server, None) == 200
    assert status(server, "Bearer anything") == 200
