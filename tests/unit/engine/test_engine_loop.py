"""The engine's loop around its steps."""

from __future__ import annotations

import time
from typing import Any

import pytest

from mlx_lm_server.engine import engine_main
from mlx_lm_server.engine.engine_main import EngineLoop
from mlx_lm_server.protocol import Outputs, Shutdown


class LongPrefill:
    """A core whose steps give nothing for a while."""

    has_work = True
    waits_for_tier = False

    def handle(self, _messages: Any) -> list[Any]:
        return []

    def step_in_parts(self) -> list[Any]:
        time.sleep(0.01)
        return [[]]

    def stats(self) -> None:
        return None

    def take_step_tokens(self) -> list[int]:
        return [1]

    def close(self) -> None:
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
    EngineLoop(link, LongPrefill()).run([])  # type: ignore[arg-type]
    assert 2 <= len(link.sent) <= 11
    assert all(message.step_tokens == [1] for message in link.sent)
