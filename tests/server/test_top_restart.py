"""`top` beside a server that goes away and comes back."""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Callable
from typing import Any

import httpx

from tests.server.harness import RunningServer
from tests.terminals import LIMIT_S, AtTerminal


def wait_until_it_answers(url: str) -> None:
    ends_s = time.monotonic() + LIMIT_S
    while True:
        try:
            if httpx.get(f"{url}/readyz", trust_env=False).status_code == 200:
                return
        except httpx.TransportError:
            pass
        assert time.monotonic() < ends_s
        time.sleep(0.02)


def test_top_outlives_a_server_that_is_started_anew(start: Callable[..., RunningServer]) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    url = f"http://127.0.0.1:{port}"
    settings: dict[str, Any] = {
        "wait": False,
        "flags": {"--port": port, "--served-model-name": "tiny"},
    }
    first = start(**settings)
    wait_until_it_answers(url)
    top = AtTerminal("top", "--url", url, "--interval", "0.1")
    top.wait_for("tiny.*ok")
    first.stop()
    top.wait_for(r"nobody answers at \S+ \(connection refused\); trying again")
    start(**settings)
    wait_until_it_answers(url)
    engine = httpx.get(f"{url}/health", trust_env=False).json()["engine"]
    top.wait_for(f"ready.*pid {engine['pid']}")
    os.kill(top.pid, signal.SIGINT)
    top.wait_for("\x1b\\[\\?1049l")
    assert top.exit_code() == 0
