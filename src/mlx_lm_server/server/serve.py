"""The life of a server process: bind, load, serve, drain, end.

run ─▶ Server.main ─┬─ uvicorn, from the start: /livez answers while the model loads
                    ├─ boot: files, engine, tokenizer, banner
                    └─ waits for a signal, a failed start or a failed engine ─▶ exit code
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
import time
from asyncio import FIRST_COMPLETED
from collections.abc import Sequence
from dataclasses import dataclass, field

import uvloop

from mlx_lm_server.config import Config
from mlx_lm_server.errors import ConfigError, EngineUnavailableError, ServerError
from mlx_lm_server.server.app import create_app
from mlx_lm_server.server.boot import boot
from mlx_lm_server.server.engines.admission import Admission
from mlx_lm_server.server.engines.engine_client import EngineClient
from mlx_lm_server.server.engines.metrics import Metrics
from mlx_lm_server.server.engines.supervisor import Limits, Supervisor
from mlx_lm_server.server.http.api_keys import ApiKeys
from mlx_lm_server.server.http.connection import ConnectionLimits
from mlx_lm_server.server.listening import HttpServer, http_server, listen
from mlx_lm_server.server.logs import set_up_logging
from mlx_lm_server.server.models.served_model import ModelNames
from mlx_lm_server.server.operations.banner import StartDisplay
from mlx_lm_server.server.services import Services
from mlx_lm_server.server.waiting import first_of

log = logging.getLogger(__name__)

SWITCH_INTERVAL_S = 0.001
# An engine that takes longer to end is told of.
SLOW_END_S = 1.0
AGAIN = "press Ctrl-C or send the signal again to end at once"
EXIT_CLEAN, EXIT_FAILED, EXIT_USAGE = 0, 1, 2


@dataclass(frozen=True)
class Surroundings:
    """What a test sets otherwise: the engine's program and how long things may take."""

    engine_command: Sequence[str] = (sys.executable, "-m", "mlx_lm_server.engine.engine_main")
    limits: Limits = field(default_factory=Limits)
    connection_limits: ConnectionLimits = field(default_factory=ConnectionLimits)


def run(config: Config, surroundings: Surroundings | None = None) -> int:
    """Serves until it is told to stop; returns the exit code."""
    set_up_logging(config.server.log_level, config.server.log_format)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # While a thread renders or parses something long, the event loop gets its turn after so much.
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    server = Server(config, surroundings or Surroundings())
    try:
        return uvloop.run(server.main())
    except ConfigError as error:
        log.critical("%s", error)
        return EXIT_USAGE
    except ServerError as error:
        log.critical("%s", error)
        return EXIT_FAILED


def build_services(config: Config) -> Services:
    """Everything but the engine and the model, on the running loop."""
    metrics = Metrics(ModelNames.of(config).shown[0])
    admission = Admission(config, num_live=lambda: client.num_live, clock=time.monotonic)
    client = EngineClient(
        metrics,
        first_token_timeout_s=config.generation.first_token_timeout_s,
        token_timeout_s=config.generation.request_timeout_s,
        resumes=not config.resume.no_resume,
        on_row_end=admission.observe_end,
    )
    metrics.engine_stats = lambda: client.stats
    metrics.num_live = lambda: client.num_live
    return Services(config, metrics, client, admission)


def stopping(num_requests: int, drain_s: float) -> str:
    """What the first signal is answered with: how long it takes, and what a second one does."""
    if num_requests == 0:
        return "stopping"
    who = "1 request is" if num_requests == 1 else f"{num_requests} requests are"
    if drain_s == 0:
        return f"stopping: {who} in work and cut off (--drain-s 0)"
    return f"stopping: {who} in work, waiting up to {drain_s:g} s (--drain-s); {AGAIN}"


class Server:
    """Owns everything in the process; lives on its event loop. `_stop` is set by each signal."""

    def __init__(self, config: Config, surroundings: Surroundings) -> None:
        self._config = config
        self._surroundings = surroundings
        self._stop = asyncio.Event()
        self._display = StartDisplay(is_json=config.server.log_format == "json")

    async def main(self) -> int:
        """Raises ConfigError or another ServerError where the start fails."""
        keys = ApiKeys(self._config.server.api_key, self._config.server.api_key_file)
        limits = self._surroundings.connection_limits
        with listen(self._config.server) as listener:
            services = build_services(self._config)
            self._watch_signals(keys)
            app = create_app(services, keys, limits)
            http = http_server(app, self._config.server, limits)
            serving = asyncio.create_task(http.serve([listener.socket]))
            try:
                return await self._live(services, serving, listener.url)
            finally:
                await self._end(services, http, serving)

    async def _live(self, services: Services, serving: asyncio.Task[None], url: str) -> int:
        around = self._surroundings
        booting = asyncio.create_task(
            boot(services, around.engine_command, around.limits, self._display, url)
        )
        stopped = asyncio.create_task(self._stop.wait())
        try:
            await first_of(booting, stopped, serving)
            if booting.done():
                failure = booting.result().failure
                await first_of(failure, stopped, serving)
                if failure.done():
                    raise failure.result()
            if serving.done():
                raise ServerError(f"the HTTP server ended: {serving.exception()}")
            return await self._drain(services)
        finally:
            booting.cancel()
            stopped.cancel()

    async def _drain(self, services: Services) -> int:
        """Takes no new work after the first signal, and gives the running work `--drain-s`. A
        second signal ends it at once."""
        self._stop.clear()
        services.admission.is_draining = True
        drain_s = self._config.server.drain_s
        log.info("%s", stopping(len(services.open_generations), drain_s))
        deadline_s = time.monotonic() + drain_s
        while services.open_generations and not self._stop.is_set():
            if time.monotonic() >= deadline_s:
                break
            await asyncio.sleep(0.02)
        is_clean = not services.open_generations
        services.metrics.is_shut_down_clean = is_clean
        for generation in list(services.open_generations):
            generation.cancel(EngineUnavailableError("the server is shutting down"))
        if not is_clean:
            log.warning("stopped before every request was finished")
        return EXIT_CLEAN if is_clean else EXIT_FAILED

    async def _end(self, services: Services, http: HttpServer, serving: asyncio.Task[None]) -> None:
        """No engine and no socket is left behind, whatever came before."""
        self._display.close()
        services.admission.is_draining = True
        await asyncio.sleep(0)  # streams that were cancelled write their last events
        if services.supervisor is not None:
            await self._end_engine(services.supervisor)
        http.force_exit = self._stop.is_set()
        http.should_exit = True
        await asyncio.gather(serving, return_exceptions=True)

    async def _end_engine(self, supervisor: Supervisor) -> None:
        """In order; a second signal kills it."""
        ending = asyncio.create_task(supervisor.stop())
        hurry = asyncio.create_task(self._stop.wait())
        await asyncio.wait((ending, hurry), timeout=SLOW_END_S, return_when=FIRST_COMPLETED)
        if not (ending.done() or hurry.done()):
            why = "" if self._config.tier.no_ssd else ", which writes its cache to disk first"
            log.info("waiting for the engine to end%s; %s", why, AGAIN)
        await first_of(ending, hurry)
        if hurry.done():
            supervisor.kill()
        hurry.cancel()
        await ending

    def _watch_signals(self, keys: ApiKeys) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._stop.set)
        if self._config.server.api_key_file is not None:
            loop.add_signal_handler(signal.SIGHUP, keys.reload)
