"""Start servers as real processes on free loopback ports, watch what they use, and stop them."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

from benchmarks import reaper

START_LIMIT_S = 120.0
STOP_LIMIT_S = 20.0
LOG_TAIL_CHARS = 3000


@dataclass(frozen=True, slots=True)
class Launch:
    """How to start a server. `{port}` in an argument becomes its port."""

    name: str
    arguments: tuple[str, ...]
    ready_path: str


@dataclass(slots=True)
class Server:
    """A server process that is ready, and the engine process below it where it has one."""

    name: str
    url: str
    process: psutil.Process
    start_to_ready_s: float

    @property
    def engine(self) -> psutil.Process:
        """The descendant that computes: the one that holds most memory."""
        return max(
            self.process.children(recursive=True),
            key=lambda child: child.memory_info().rss,
            default=self.process,
        )

    def cpu_s(self) -> float:
        """User and system time of the server process alone."""
        return _cpu_s(self.process)

    def engine_cpu_s(self) -> float:
        return _cpu_s(self.engine)

    def rss_bytes(self) -> int:
        return self.process.memory_info().rss


def _cpu_s(process: psutil.Process) -> float:
    times = process.cpu_times()
    return times.user + times.system


def ours(
    model: str, *options: str, name: str = "mlx-lm-server", cache_dir: Path | None = None
) -> Launch:
    """With its cache on disk only where a folder is given."""
    disk = ("--no-ssd",) if cache_dir is None else ("--ssd-cache-dir", str(cache_dir))
    arguments = ("-m", "mlx_lm_server", "--model", model, "--port", "{port}", *disk, *options)
    return Launch(name, (*arguments, "--log-level", "warning"), "/readyz")


def peer(model: str, *options: str, has_blas: bool = True) -> Launch:
    """`mlx_lm.server`, with the BLAS that our engine uses or as its wheel ships."""
    module = "benchmarks.peers.mlx_lm_server_with_blas" if has_blas else "mlx_lm.server"
    name = "mlx_lm.server" if has_blas else "mlx_lm.server as shipped"
    arguments = ("-m", module, "--model", model, "--port", "{port}", "--log-level", "WARNING")
    return Launch(name, (*arguments, *options), "/health")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def running(launch: Launch) -> Iterator[Server]:
    """Raises RuntimeError with the end of its log where the server does not get ready."""
    port = free_port()
    arguments = [argument.replace("{port}", str(port)) for argument in launch.arguments]
    with tempfile.NamedTemporaryFile(suffix=".log") as log:
        began_at = time.perf_counter()
        child = reaper.start([sys.executable, *arguments], stdout=log, stderr=log)
        process = psutil.Process(child.pid)
        try:
            url = f"http://127.0.0.1:{port}"
            wait_ready(child, url + launch.ready_path, Path(log.name))
            yield Server(launch.name, url, process, time.perf_counter() - began_at)
        finally:
            stop(child, process)


def wait_ready(child: subprocess.Popen[bytes], url: str, log: Path) -> None:
    deadline = time.monotonic() + START_LIMIT_S
    while time.monotonic() < deadline and child.poll() is None:
        if is_ok(url):
            return
        time.sleep(0.02)
    tail = log.read_text(errors="replace")[-LOG_TAIL_CHARS:]
    raise RuntimeError(f"{url} did not get ready:\n{tail}")


def is_ok(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2.0) as answer:
            return answer.status == 200
    except OSError:
        return False


def stop(child: subprocess.Popen[bytes], process: psutil.Process) -> None:
    """Ask, wait, insist; nothing that it started may be left."""
    family = []
    with contextlib.suppress(psutil.NoSuchProcess):
        family = process.children(recursive=True)
    child.terminate()
    try:
        child.wait(STOP_LIMIT_S)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()
    _, alive = psutil.wait_procs(family, timeout=STOP_LIMIT_S)
    for orphan in alive:
        with contextlib.suppress(psutil.NoSuchProcess):
            orphan.kill()


def pin(process: psutil.Process, cores: set[int]) -> None:
    """All threads of the process; an affinity is a thread's, and new threads inherit it."""
    for thread in process.threads():
        with contextlib.suppress(ProcessLookupError):
            os.sched_setaffinity(thread.id, cores)
