"""The first signal drains, the second ends at once."""

from __future__ import annotations

import json
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

import psutil
import pytest

from mlx_lm_server.server.serve import stopping
from tests import fakes
from tests.observations import observes
from tests.server.harness import RunningServer


class Asking(threading.Thread):
    """A streamed request of its own thread; `lines` is what came."""

    def __init__(self, server: RunningServer, **fields: Any) -> None:
        super().__init__()
        self._server, self._fields = server, fields
        self.lines: list[str] = []
        self.status = 0

    def run(self) -> None:
        request = {"prompt": "abc", "stream": True, **self._fields}
        with self._server.new_client() as client:  # noqa: SIM117
            with client.stream("POST", "/v1/completions", json=request) as response:
                self.status = response.status_code
                self.lines = [line for line in response.iter_lines() if line]


def asked(server: RunningServer, **fields: Any) -> Asking:
    asking = Asking(server, **fields)
    asking.start()
    server.wait_until(lambda: server.health()["num_running"] > 0)
    return asking


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_idle_server_ends_at_once_and_clean(
    start: Callable[..., RunningServer], number: int
) -> None:
    server = start()
    server.signal(number)
    assert server.process.wait(3) == 0
    [line] = [line for line in server.output().splitlines() if "stopping" in line]
    assert line.endswith("stopping"), "there is nothing to wait for"


def test_the_first_signal_says_how_long_it_takes_and_what_a_second_one_does() -> None:
    assert stopping(0, 30) == "stopping"
    for num_requests, who in ((1, "1 request is in work"), (3, "3 requests are in work")):
        line = stopping(num_requests, 2.5)
        for words in (who, "up to 2.5 s (--drain-s)", "again to end at once"):
            assert words in line
    assert stopping(1, 0) == "stopping: 1 request is in work and cut off (--drain-s 0)"


def test_running_requests_are_finished_and_new_ones_refused(
    start: Callable[..., RunningServer],
) -> None:
    server = start(engine={"step_s": 0.01})
    asking = asked(server, max_tokens=80)
    engine = psutil.Process(server.engine_pid)
    server.signal()
    server.wait_until(lambda: server.health()["status"] == "shutting_down")
    response = server.chat("x")
    assert response.status_code == 503
    assert "shutting down" in response.json()["error"]["message"]
    assert server.status("/readyz") == 503
    assert server.status("/livez") == 200
    asking.join()
    assert asking.lines[-1] == "data: [DONE]"
    assert json.loads(asking.lines[-2][6:])["choices"][0]["finish_reason"] == "length"
    assert server.process.wait(5) == 0
    psutil.wait_procs([engine], timeout=3)
    assert not engine.is_running()


@observes("ServerConfig.drain_s")
@pytest.mark.parametrize("limit_s", [0, 0.5])
def test_after_the_drain_limit_streams_end_with_an_error(
    start: Callable[..., RunningServer], limit_s: float
) -> None:
    server = start(flags={"--drain-s": str(limit_s)}, engine={"step_s": 0.01})
    asking = asked(server, max_tokens=4000)
    began_s = time.monotonic()
    server.signal()
    assert server.process.wait(5) == 1
    assert limit_s < time.monotonic() - began_s < limit_s + 2
    assert stopping(1, limit_s) in server.output()
    asking.join()
    assert asking.lines[-1] == "data: [DONE]"
    assert "shutting down" in json.loads(asking.lines[-2][6:])["error"]["message"]


def test_a_second_signal_ends_at_once(start: Callable[..., RunningServer]) -> None:
    server = start(drain_s=60, engine={"step_s": 0.01})
    asking = asked(server, max_tokens=4000)
    engine = psutil.Process(server.engine_pid)
    server.signal(signal.SIGINT)
    server.wait_until(lambda: server.health()["status"] == "shutting_down")
    began_s = time.monotonic()
    server.signal(signal.SIGINT)
    assert server.process.wait(5) == 1
    assert time.monotonic() - began_s < 2
    asking.join()
    psutil.wait_procs([engine], timeout=3)
    assert not engine.is_running()


def test_a_second_signal_does_not_wait_for_an_engine_that_hangs(
    start: Callable[..., RunningServer],
) -> None:
    server = start(drain_s=0.1, limits={"stop_s": 30.0}, engine={"step_s": 0.01})
    asking = Asking(server, seed=fakes.HANG)
    asking.start()
    time.sleep(0.3)
    server.signal()
    server.wait_until(lambda: "waiting for the engine to end, which writes" in server.output())
    assert server.is_running
    server.signal()
    assert server.process.wait(5) == 1
    asking.join()


def test_a_signal_while_loading_ends_the_start(start: Callable[..., RunningServer]) -> None:
    server = start(wait=False, engine={"load_s": 30})
    server.wait_until(lambda: server.status("/livez") == 200)
    server.wait_until(lambda: server.health()["engine"].get("pid") is not None)
    engine = psutil.Process(server.engine_pid)
    server.signal()
    assert server.process.wait(3) == 0
    psutil.wait_procs([engine], timeout=3)
    assert not engine.is_running()
