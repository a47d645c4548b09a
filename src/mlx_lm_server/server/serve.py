"""The life of a server process: bind, load, serve, drain, end.

run ─▶ Server.main ─┬─ uvicorn, from the start: /livez answers while the model loads
                    ├─ _boot: files, engine, tokenizer, banner
                    └─ waits for a signal, a failed start or a failed engine ─▶ exit code
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import resource
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar, cast

import uvicorn
import uvloop

from mlx_lm_server.config import Config
from mlx_lm_server.errors import (
    ConfigError,
    EngineUnavailableError,
    ServerError,
)
from mlx_lm_server.protocol import LoadModel, Ready
from mlx_lm_server.server.admission import Admission
from mlx_lm_server.server.api_keys import ApiKeys
from mlx_lm_server.server.app import create_app
from mlx_lm_server.server.banner import StartDisplay
from mlx_lm_server.server.connection import ConnectionLimits, bounded_protocol
from mlx_lm_server.server.engine_client import EngineClient
from mlx_lm_server.server.logs import set_up_logging
from mlx_lm_server.server.metrics import Metrics
from mlx_lm_server.server.model_files import (
    ModelFacts,
    read_facts,
    resolve_adapter,
    resolve_model,
)
from mlx_lm_server.server.served_model import ModelNames, ServedModel, bounds_of, defaults_of
from mlx_lm_server.server.services import Services
from mlx_lm_server.server.supervisor import Limits, Supervisor
from mlx_lm_server.server.tokenizer import Tokenizer, load_tokenizer

log = logging.getLogger(__name__)

ENGINE_COMMAND = (sys.executable, "-m", "mlx_lm_server.engine.engine_main")
DRAIN_S = 30.0
# Longer than clients keep their idle connections, so that none is closed as it is used again.
KEEP_ALIVE_S = 75
MAX_OPEN_FILES = 65536
T = TypeVar("T")
EXIT_CLEAN, EXIT_FAILED, EXIT_USAGE = 0, 1, 2


def run(
    config: Config,
    *,
    engine_command: Sequence[str] = ENGINE_COMMAND,
    limits: Limits | None = None,
    connection_limits: ConnectionLimits | None = None,
    drain_s: float = DRAIN_S,
) -> int:
    """Serves until it is told to stop; returns the exit code."""
    set_up_logging(config.server.log_level, config.server.log_format)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    _allow_many_files()
    server = Server(
        config,
        engine_command=engine_command,
        limits=limits or Limits(),
        connection_limits=connection_limits or ConnectionLimits(),
        drain_s=drain_s,
    )
    try:
        return uvloop.run(server.main())
    except ConfigError as error:
        log.critical("%s", error)
        return EXIT_USAGE
    except ServerError as error:
        log.critical("%s", error)
        return EXIT_FAILED


def _allow_many_files() -> None:
    """Each connection is a file; macOS allows 256 unless asked."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MAX_OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, MAX_OPEN_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


class _Uvicorn(uvicorn.Server):
    """Leaves the signals to us: a first one drains before the connections are closed."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class Server:
    """Owns everything in the process; lives on its event loop."""

    def __init__(
        self,
        config: Config,
        *,
        engine_command: Sequence[str],
        limits: Limits,
        connection_limits: ConnectionLimits,
        drain_s: float,
    ) -> None:
        self._config = config
        self._engine_command = engine_command
        self._limits = limits
        self._connection_limits = connection_limits
        self._drain_s = drain_s
        self._display = StartDisplay(is_json=config.server.log_format == "json")
        self.url = ""

    async def main(self) -> int:
        """Raises ConfigError or another ServerError where the start fails."""
        keys = ApiKeys(self._config.server.api_key, self._config.server.api_key_file)
        with self._listen() as listener:
            self._services = self._build_services()
            stop = self._watch_signals(keys)
            app = create_app(self._services, keys, self._connection_limits)
            http = _Uvicorn(self._uvicorn_config(app))
            serving = asyncio.create_task(http.serve([listener] if listener else None))
            try:
                return await self._live(stop, serving)
            finally:
                await self._end(http, serving, stop)

    def _build_services(self) -> Services:
        generation = self._config.generation
        metrics = Metrics(ModelNames.of(self._config).shown[0])
        admission = Admission(
            self._config,
            num_live=lambda: client.num_live,
            clock=time.monotonic,
        )
        client = EngineClient(
            metrics,
            first_token_timeout_s=generation.first_token_timeout_s,
            token_timeout_s=generation.request_timeout_s,
            on_row_end=admission.observe_end,
        )
        metrics.engine_stats = lambda: client.stats
        metrics.num_live = lambda: client.num_live
        return Services(self._config, metrics, client, admission)

    async def _live(self, stop: asyncio.Event, serving: asyncio.Task[None]) -> int:
        boot = asyncio.create_task(self._boot())
        stopped = asyncio.create_task(stop.wait())
        try:
            await _first_of(boot, stopped, serving)
            if boot.done():
                supervisor = boot.result()
                await _first_of(supervisor.failure, stopped, serving)
                if supervisor.failure.done():
                    raise supervisor.failure.result()
            if serving.done():
                raise ServerError(f"the HTTP server ended: {serving.exception()}")
            return await self._drain(stop)
        finally:
            boot.cancel()
            stopped.cancel()

    async def _boot(self) -> Supervisor:
        """From the model's name to a server that is ready."""
        model = self._config.model
        folder = await _in_daemon_thread(resolve_model, model.model)
        facts = read_facts(folder)
        supervisor = Supervisor(
            self._engine_command,
            self._load_message(folder),
            self._services.client,
            self._services.metrics,
            limits=self._limits,
            on_progress=self._display.show,
        )
        self._services.supervisor = supervisor
        supervisor.start()
        tokenizer = await _in_daemon_thread(
            load_tokenizer, folder, facts, model.chat_template, model.chat_template_args
        )
        await _first_of(supervisor.first_ready, supervisor.failure)
        if not supervisor.failure.done():
            self._on_ready(folder, facts, tokenizer, supervisor.first_ready.result())
        return supervisor

    def _load_message(self, folder: Path) -> LoadModel:
        config = self._config
        gb, goal_ms = config.kv.memory_limit_gb, config.batching.itl_goal_ms
        return LoadModel(
            model_path=str(folder),
            adapter_path=resolve_adapter(config.model.adapter_path),
            trust_remote_code=config.model.trust_remote_code,
            cpu_weights=config.cpu.cpu_weights,
            num_threads=config.cpu.cpu_threads,
            max_batch_size=config.batching.max_batch_size,
            max_num_batched_tokens=config.batching.max_num_batched_tokens,
            prefill_step_size=config.batching.prefill_step_size,
            prefill_batch_size=config.batching.prefill_batch_size,
            itl_goal_s=None if goal_ms is None else goal_ms / 1000,
            max_kv_tokens=config.kv.max_kv_size,
            memory_limit_bytes=None if gb is None else int(gb * 10**9),
        )

    def _on_ready(
        self, folder: Path, facts: ModelFacts, tokenizer: Tokenizer, ready: Ready
    ) -> None:
        model = ServedModel(
            names=ModelNames.of(self._config, folder),
            tokenizer=tokenizer,
            bounds=bounds_of(self._config, facts, ready),
            defaults=defaults_of(self._config, facts.defaults),
            vocab_size=ready.vocab_size,
            created_s=int(time.time()),
        )
        self._services.set_model(model)
        gc.collect()
        gc.freeze()  # what stays for ever need not be looked at again
        self._display.banner(self._config, model, ready, self.url)

    async def _drain(self, stop: asyncio.Event) -> int:
        """After the first signal: no new work, the running work has `drain_s`. A second signal
        ends it at once."""
        stop.clear()
        services = self._services
        services.admission.is_draining = True
        log.info("stopping: %d requests are in work", services.admission.num_open)
        deadline_s = asyncio.get_running_loop().time() + self._drain_s
        while services.open_generations and not stop.is_set():
            if asyncio.get_running_loop().time() > deadline_s:
                break
            await asyncio.sleep(0.02)
        is_clean = not services.open_generations
        services.metrics.is_shut_down_clean = is_clean
        for generation in list(services.open_generations):
            generation.cancel(EngineUnavailableError("the server is shutting down"))
        await asyncio.sleep(0)  # their last events are written
        if not is_clean:
            log.warning("stopped before every request was finished")
        return EXIT_CLEAN if is_clean else EXIT_FAILED

    async def _end(
        self, http: uvicorn.Server, serving: asyncio.Task[None], stop: asyncio.Event
    ) -> None:
        """No engine and no socket is left behind, whatever came before."""
        self._display.close()
        self._services.admission.is_draining = True
        if self._services.supervisor is not None:
            await self._end_engine(self._services.supervisor, stop)
        http.force_exit = stop.is_set()
        http.should_exit = True
        await asyncio.gather(serving, return_exceptions=True)

    async def _end_engine(self, supervisor: Supervisor, stop: asyncio.Event) -> None:
        """In order; a second signal kills it."""
        stopping = asyncio.create_task(supervisor.stop())
        hurry = asyncio.create_task(stop.wait())
        await _first_of(stopping, hurry)
        if hurry.done():
            supervisor.kill()
        hurry.cancel()
        await stopping

    def _watch_signals(self, keys: ApiKeys) -> asyncio.Event:
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, stop.set)
        if self._config.server.api_key_file is not None:
            loop.add_signal_handler(signal.SIGHUP, keys.reload)
        return stop

    @contextmanager
    def _listen(self) -> Iterator[socket.socket | None]:
        """The bound socket, before anything is loaded; None where uvicorn binds a Unix socket."""
        server = self._config.server
        if server.uds is not None:
            self.url = f"unix:{server.uds}"
            yield None
            Path(server.uds).unlink(missing_ok=True)
            return
        family = socket.AF_INET6 if ":" in server.host else socket.AF_INET
        with socket.socket(family) as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                listener.bind((server.host, server.port))
            except OSError as error:
                raise ServerError(
                    f"cannot listen on {server.host}:{server.port}: {error.strerror}"
                ) from error
            scheme = "https" if server.ssl_certfile else "http"
            host = f"[{server.host}]" if family == socket.AF_INET6 else server.host
            self.url = f"{scheme}://{host}:{listener.getsockname()[1]}"
            yield listener

    def _uvicorn_config(self, app: object) -> uvicorn.Config:
        server = self._config.server
        config = uvicorn.Config(
            app,  # type: ignore[arg-type]
            uds=server.uds,
            http=bounded_protocol(self._connection_limits),
            ws="none",
            lifespan="off",
            access_log=False,
            log_config=None,
            server_header=False,
            timeout_keep_alive=KEEP_ALIVE_S,
            timeout_graceful_shutdown=2,
            ssl_certfile=server.ssl_certfile,
            ssl_keyfile=server.ssl_keyfile,
        )
        try:
            config.load()
        except OSError as error:
            raise ConfigError(f"--ssl-certfile, --ssl-keyfile: {error}") from error
        return config


async def _first_of(*futures: asyncio.Future[Any]) -> None:
    await asyncio.wait(futures, return_when=asyncio.FIRST_COMPLETED)


def _in_daemon_thread(function: Callable[..., T], *args: Any) -> asyncio.Future[T]:
    """Like asyncio.to_thread, but the process may end while it runs: downloads take long."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()

    def settle(result: T | None, error: BaseException | None) -> None:
        if future.done():
            return
        if error is not None:
            future.set_exception(error)
        else:
            future.set_result(cast(T, result))

    def work() -> None:
        result, failure = None, None
        try:
            result = function(*args)
        except BaseException as error:  # noqa: BLE001 - it is raised where it is awaited
            failure = error
        with suppress(RuntimeError):  # the loop may be gone by now
            loop.call_soon_threadsafe(settle, result, failure)

    threading.Thread(target=work, daemon=True, name=function.__name__).start()
    return future
