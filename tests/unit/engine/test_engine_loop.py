"""The engine's loop around its steps."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from mlx_lm_server.engine import engine_main
from mlx_lm_server.engine.engine_main import EngineLoop
from mlx_lm_server.protocol import Outputs, Shutdown

PROCESS = """
import runpy, socket, sys
from mlx_lm_server.engine import link

def receive(self, wait_s):
    import mlx_lm.utils
    from transformers.utils import is_torch_available
    print(is_torch_available())
    raise link.LinkClosed("enough")

link.ServerLink.receive = receive
ours, _ = socket.socketpair()
sys.argv = ["engine", "--fd", str(ours.detach())]
runpy.run_module("mlx_lm_server.engine.engine_main", run_name="__main__")
"""


class LongPrefill:
    """A core whose steps give nothing for a while."""

    has_work = True
    waits_for_tier = False
    took_memory = False

    def handle(self, _messages: Any) -> list[Any]:
        return []

    def step(self) -> list[Any]:
        time.sleep(0.01)
        return []

    def stats(self) -> None:
        return None

    def close(self) -> None:
        pass


class NoUpkeep:
    def after_step(self, *, took_memory: bool) -> None:
        pass

    def rest(self) -> None:
        pass


class Link:
    """Ends the loop after some time and keeps what was sent."""

    def __init__(self, lasts_s: float) -> None:
        self._ends_s = time.monotonic() + lasts_s
        self.sent: list[Outputs] = []

    def send(self, message: Outputs) -> None:
        self.sent.append(message)

    def receive(self, _wait_s: float) -> list[Any]:
        return [Shutdown()] if time.monotonic() > self._ends_s else []


def test_a_prefill_without_outputs_is_not_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_main, "HEARTBEAT_S", 0.1)
    link = Link(lasts_s=1.0)
    EngineLoop(link, LongPrefill(), NoUpkeep()).run([])  # type: ignore[arg-type]
    assert 2 <= len(link.sent) <= 11


def test_an_engine_does_without_torch_where_it_is_installed(tmp_path: Path) -> None:
    """Here is one that cannot be imported."""
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("raise RuntimeError('imported torch')")
    (tmp_path / "torch-2.99.0.dist-info").mkdir()
    (tmp_path / "torch-2.99.0.dist-info" / "METADATA").write_text("Name: torch\nVersion: 2.99.0\n")
    done = subprocess.run(
        [sys.executable, "-c", PROCESS],
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.stdout == "False\n", done.stderr[-2000:]
