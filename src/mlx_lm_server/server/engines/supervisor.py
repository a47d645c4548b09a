"""Keeps an engine running: starts it, watches it, ends it, starts it anew when it dies.

    starting ──Ready──▶ ready ──EOF or hung──▶ backoff ──▶ starting …
        │                 │                       │
        └ LoadFailed,     └ stop() ─▶ stopped     └ crash loop ─▶ failed
          death before
          the first Ready ─▶ failed

Runs on the event loop. A death costs the streams that were in the engine a pause: the next one
takes them up (engine_client.py). Deaths count as a loop only where nothing came of the engine in
between, neither a token nor a closer look at who is to blame. `failed` is final: the server ends
with the reason.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import msgspec

from mlx_lm_server import errors
from mlx_lm_server.errors import EngineDiedError, EngineError, ModelError, ServerError
from mlx_lm_server.protocol import (
    LoadFailed,
    LoadModel,
    LoadProgress,
    Outputs,
    Ready,
    Shutdown,
    ToServer,
    WarmUp,
)
from mlx_lm_server.server.engines.engine_client import EngineClient
from mlx_lm_server.server.engines.engine_process import EngineProcess
from mlx_lm_server.server.engines.metrics import Metrics
from mlx_lm_server.server.engines.standby import Standby

log = logging.getLogger(__name__)

State = Literal["starting", "ready", "backoff", "failed", "stopped"]


@dataclass(frozen=True)
class Limits:
    """When an engine counts as hung, and when restarting it makes no sense any more."""

    tick_s: float = 0.25
    hung_s: float = 30.0
    hung_forecasts: float = 20.0
    load_s: float = 1800.0
    max_deaths: int = 5
    deaths_within_s: float = 60.0
    first_backoff_s: float = 0.2
    close_s: float = 1.0  # from the end of its socket to its own
    stop_s: float = 20.0  # the engine writes its cache to disk first
    standby_after_s: float = 1.0  # the engine's first tokens first


class Supervisor:
    """Keeps one engine running and owns its process; the client's streams follow its state."""

    def __init__(
        self,
        command: Sequence[str],
        load: LoadModel,
        client: EngineClient,
        metrics: Metrics,
        *,
        limits: Limits | None = None,
        has_standby: bool = False,
        on_progress: Callable[[LoadProgress], None] = lambda _: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._command = command
        self._load = load
        self._client = client
        self._metrics = metrics
        self._limits = limits or Limits()
        self._on_progress = on_progress
        self._process: EngineProcess | None = None
        order = WarmUp(load.num_threads, with_adapters=load.adapter_path is not None)
        self._standby = Standby(command, order) if has_standby else None
        self._why_killed = ""
        self._clock = clock
        self._last_message_s = self._clock()
        self._last_tick_s = self._clock()
        self._forecast_s = 0.0
        self._deaths_s: deque[float] = deque(maxlen=self._limits.max_deaths)
        self._lost = asyncio.Event()
        self._stopping = False
        self._task: asyncio.Task[None] | None = None
        self.state: State = "starting"
        self.ready: Ready | None = None
        self.first_ready: asyncio.Future[Ready] = asyncio.get_running_loop().create_future()
        self.failure: asyncio.Future[ServerError] = asyncio.get_running_loop().create_future()
        self.num_restarts = 0

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process else None

    def start(self) -> None:
        self._task = asyncio.create_task(self._run(), name="supervisor")
        self._task.add_done_callback(self._on_end)

    def _on_end(self, task: asyncio.Task[None]) -> None:
        """Ends the server where this task has a fault of its own: nobody else would start an
        engine."""
        if task.cancelled() or (fault := task.exception()) is None:
            return
        log.critical("the engine cannot be looked after", exc_info=fault)
        self._fail(EngineError(f"the engine cannot be looked after: {fault!r}"))

    async def stop(self) -> None:
        """Ends the engine: asks, waits, kills. No engine is left behind."""
        self._stopping = True
        if self._process is not None and self.state == "ready":
            self._process.send(Shutdown())
            if not await self._process.wait(self._limits.stop_s):
                log.warning("the engine does not end by itself; it is killed")
        self.kill()
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        if self._standby is not None:
            await self._standby.stop()
        if self.state != "failed":
            self.state = "stopped"

    def kill(self) -> None:
        self._stopping = True
        if self._process is not None:
            self._process.kill()
        if self._standby is not None:
            self._standby.kill()

    async def _run(self) -> None:
        while not self._stopping and not self.failure.done():
            counts = await self._run_one_engine()
            if not self._stopping and not self.failure.done():
                await self._back_off(counts=counts)

    async def _run_one_engine(self) -> bool:
        """From the spawn of an engine to its end. Returns whether that counts against the next."""
        self.state = "starting"
        self._lost.clear()
        self._why_killed = ""
        self._last_message_s = self._last_tick_s = self._clock()
        try:
            process = self._process = await self._new_process()
        except OSError as error:
            self._fail(EngineError(f"the engine cannot be started: {error}"))
            return True
        process.send(self._load)
        while not self._lost.is_set():
            self._tick()
            await self._wait_until_lost(self._limits.tick_s)
        return await self._bury(process)

    async def _new_process(self) -> EngineProcess:
        """Returns the one that waits, or one that is only starting. Raises OSError."""
        process = self._standby.take() if self._standby is not None else None
        if process is not None:
            process.on_message, process.on_lost = self._on_message, self._lost.set
            return process
        process = EngineProcess(self._on_message, self._lost.set)
        await process.start(self._command)
        return process

    async def _wait_until_lost(self, limit_s: float) -> None:
        try:
            async with asyncio.timeout(limit_s):
                await self._lost.wait()
        except TimeoutError:
            return

    def _tick(self) -> None:
        now = self._clock()
        late_s = now - self._last_tick_s - self._limits.tick_s
        self._last_tick_s = now
        if late_s > 1.0:  # this process slept, not the engine: its messages are still unread
            self._last_message_s += late_s
        self._client.expire(now)
        limit_s = self._limits.load_s
        if self.state == "ready":
            limit_s = max(self._limits.hung_s, self._limits.hung_forecasts * self._forecast_s)
            if not self._client.num_live:  # an idle engine has nothing to say
                self._last_message_s = now
        silent_s = now - self._last_message_s
        if silent_s > limit_s and self._process is not None:
            self._why_killed = f"silent for {silent_s:.0f} s"
            log.error("the engine has been %s; it is killed", self._why_killed)
            self._process.kill()

    async def _bury(self, process: EngineProcess) -> bool:
        """The socket is closed: the process must end too. Returns whether its death counts."""
        if not await process.wait(self._limits.close_s):
            process.kill()
            await process.wait(self._limits.stop_s)
        was_ready = self.state == "ready"
        self.state = "backoff"
        how = self._why_killed or _describe_exit(process.exit_code)
        inquest = self._client.detach(how, process.rows_under_way())
        if self._stopping or self.failure.done():
            self._client.give_up(EngineDiedError("the engine ended while it worked on this"))
            return True
        if not self.first_ready.done():
            self._fail(EngineError(f"the engine ended while it loaded the model ({how})"))
            return True
        log.error(
            "the engine ended (%s)%s; it is started anew", how, "" if was_ready else " loading"
        )
        if inquest.made_tokens:
            self._deaths_s.clear()
        return not inquest.leads_on

    async def _back_off(self, *, counts: bool) -> None:
        """Waits, unless the death says nothing against the next engine."""
        now = self._clock()
        if counts:
            self._deaths_s.append(now)
            num_recent = sum(now - then < self._limits.deaths_within_s for then in self._deaths_s)
            if num_recent >= self._limits.max_deaths:
                within = f"{num_recent} times in {self._limits.deaths_within_s:g} s"
                self._fail(EngineError(f"the engine died {within}"))
                return
            await asyncio.sleep(self._limits.first_backoff_s * 2 ** (num_recent - 1))
        self.num_restarts += 1
        self._metrics.engine_restarts += 1

    def _on_message(self, message: ToServer) -> None:
        self._last_message_s = self._clock()
        if isinstance(message, Outputs):
            self._forecast_s = message.stats.forecast_step_s
            self._client.on_outputs(message)
        elif isinstance(message, LoadProgress):
            self._on_progress(message)
        elif isinstance(message, Ready):
            self._on_ready(message)
        elif isinstance(message, LoadFailed):
            self._on_load_failed(message)

    def _on_ready(self, ready: Ready) -> None:
        assert self._process is not None
        self.state = "ready"
        self.ready = ready
        self._load = msgspec.structs.replace(self._load, measured=ready.measured)
        self._client.attach(self._process.send)
        if self._standby is not None:
            self._standby.prepare(self._limits.standby_after_s)
        if not self.first_ready.done():
            self.first_ready.set_result(ready)
        else:
            log.info("the engine is ready again")

    def _on_load_failed(self, failed: LoadFailed) -> None:
        kind = getattr(errors, failed.kind, None)
        is_model_error = isinstance(kind, type) and issubclass(kind, ModelError)
        if is_model_error and kind is not None and not self.first_ready.done():
            self._fail(kind(failed.message))
        elif not self.first_ready.done():
            self._fail(EngineError(failed.message))
        else:
            log.error("the engine could not load the model again: %s", failed.message)
        if self._process is not None:
            self._process.send(Shutdown())

    def _fail(self, error: ServerError) -> None:
        self.state = "failed"
        self._client.give_up(error)
        if not self.failure.done():
            self.failure.set_result(error)


def _describe_exit(code: int | None) -> str:
    if code is None:
        return "still running"
    return f"signal {-code}" if code < 0 else f"exit code {code}"
