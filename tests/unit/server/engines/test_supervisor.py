"""An engine is watched by what it says, and no engine outlives its socket."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import psutil
from tests import fakes

from mlx_lm_server.errors import RequestKillsEngineError
from mlx_lm_server.protocol import LoadModel, SamplingParams
from mlx_lm_server.server.answers.generate_request import GenerateRequest
from mlx_lm_server.server.engines.engine_client import EngineClient, Mailbox, OutputStream
from mlx_lm_server.server.engines.metrics import Metrics
from mlx_lm_server.server.engines.supervisor import Limits, Supervisor


class Clock:
    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


class Scene:
    """A supervisor of a fake engine, and a clock that stands still."""

    def __init__(self, *more: str) -> None:
        metrics = Metrics("m")
        self.clock = Clock()
        self.client = EngineClient(metrics, first_token_timeout_s=0.0, token_timeout_s=0.0)
        self.mailbox = Mailbox()
        self.supervisor = Supervisor(
            [*fakes.command(), *more],
            LoadModel("none"),
            self.client,
            metrics,
            limits=Limits(tick_s=0.01, first_backoff_s=0.01, close_s=0.05),
            clock=self.clock,
        )

    @property
    def pid(self) -> int:
        assert self.supervisor.pid is not None
        return self.supervisor.pid

    def submit(self, seed: int) -> OutputStream:
        request = GenerateRequest([1, 2], SamplingParams(max_tokens=9, seed=seed))
        [stream] = self.client.submit("r", [request], self.mailbox, 0.0)
        return stream


@asynccontextmanager
async def running() -> AsyncIterator[Scene]:
    scene = Scene()
    scene.supervisor.start()
    try:
        await scene.supervisor.first_ready
        yield scene
    finally:
        await scene.supervisor.stop()


async def test_a_fault_of_its_own_ends_the_server_and_does_not_leave_it_without_an_engine() -> None:
    scene = Scene(None)  # type: ignore[arg-type] # which no program takes
    scene.supervisor.start()
    async with asyncio.timeout(5):
        error = await scene.supervisor.failure
    assert "cannot be looked after: TypeError" in str(error)
    assert scene.supervisor.state == "failed"
    await scene.supervisor.stop()


async def test_the_time_in_which_the_whole_machine_slept_is_no_silence_of_the_engine() -> None:
    """The engine is stopped, so that only the clock tells how long it has said nothing."""
    async with running() as scene:
        stream, engine = scene.submit(fakes.SILENT), psutil.Process(scene.pid)
        os.kill(engine.pid, signal.SIGSTOP)
        scene.clock.now_s += 10_000.0
        await asyncio.sleep(0.1)  # some ticks
        assert engine.status() == psutil.STATUS_STOPPED
        assert not stream.is_ended
        os.kill(engine.pid, signal.SIGCONT)


async def test_an_engine_that_closes_its_socket_and_goes_on_is_killed() -> None:
    async with running() as scene:
        stream, pid = scene.submit(fakes.DEAF), scene.pid
        await scene.mailbox.take()
        assert isinstance(stream.error, RequestKillsEngineError)
        assert not psutil.pid_exists(pid)
