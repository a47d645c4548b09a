"""Contenders as child processes, so that none patches another's mlx-lm or shares its memory."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator

import msgspec
import psutil

from benchmarks import reaper
from benchmarks.contenders.load import About, Load, Measured
from benchmarks.processes import pin
from mlx_lm_server.server.engines.engine_process import ENGINE_ENVIRONMENT

STOP_LIMIT_S = 10.0
# These run in the environment that the supervisor gives an engine.
OURS = ("engine", "engine_unhurried", "bare")


class Worker:
    """One contender. It computes only while it is asked."""

    def __init__(self, name: str, model: str, threads: int | None) -> None:
        command = [sys.executable, "-m", "benchmarks.contenders", name, "--model", model]
        if threads is not None:
            command += ["--threads", str(threads)]
        self.name = name
        environment = ENGINE_ENVIRONMENT | os.environ if name in OURS else None
        self._child = reaper.start(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment
        )
        self.about = msgspec.json.decode(self._line(), type=About)

    def measure(self, load: Load) -> Measured:
        assert self._child.stdin is not None
        self._child.stdin.write(msgspec.json.encode(load) + b"\n")
        self._child.stdin.flush()
        return msgspec.json.decode(self._line(), type=Measured)

    def pin(self, cores: set[int]) -> None:
        pin(psutil.Process(self._child.pid), cores)

    def stop(self) -> None:
        assert self._child.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._child.stdin.close()
        try:
            self._child.wait(STOP_LIMIT_S)
        except subprocess.TimeoutExpired:
            self._child.kill()
            self._child.wait()

    def _line(self) -> bytes:
        assert self._child.stdout is not None
        line = self._child.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.name} ended with {self._child.wait()}")
        return line


@contextlib.contextmanager
def workers(*names: str, model: str, threads: int | None = None) -> Iterator[dict[str, Worker]]:
    """Started one after the other, stopped together."""
    with contextlib.ExitStack() as stack:
        made = {}
        for name in names:
            made[name] = Worker(name, model, threads)
            stack.callback(made[name].stop)
        yield made
