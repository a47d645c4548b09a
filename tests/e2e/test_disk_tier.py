"""A conversation outlives its server: stopped gracefully, or killed when all is written through."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from .conftest import Nano
from .test_prefix_cache import ask, metric


def facts(nano: Nano) -> dict[str, Any]:
    found: dict[str, Any] = nano.client.get("/health").json()["disk_tier"]
    return found


def stop(nano: Nano) -> None:
    assert nano.stop() == 0


def kill(nano: Nano) -> None:
    """Server and engine, at once, when the last answer has been written."""
    ends_s = time.monotonic() + 20
    while not (saves := facts(nano)["saves"]) or facts(nano)["saves_persisted"] < saves:
        assert time.monotonic() < ends_s
        time.sleep(0.05)
    engine = nano.engine()
    nano.process.kill()
    engine.kill()
    nano.process.wait(10)
    nano.client.close()


def content(answer: dict[str, Any]) -> str:
    return str(answer["choices"][0]["message"]["content"])


@pytest.mark.parametrize(("policy", "ends"), [("evict_only", stop), ("write_through", kill)])
def test_a_conversation_goes_on_after_a_restart(
    nano: Nano, policy: str, ends: Callable[[Nano], None], tmp_path: Path
) -> None:
    def start(name: str) -> Nano:
        return Nano(tmp_path / name, "--ssd-policy", policy, cache_dir=tmp_path / "cache")

    first = start("first.log")
    question = "What is the capital of Italy?"
    said = content(ask(first, question))
    assert facts(first)["folder"].startswith(str(tmp_path / "cache"))
    assert facts(first)["is_open"]
    ends(first)

    again = start("again.log")
    turn = (question, said, "And of Spain?")
    second = ask(again, *turn)
    cached = second["usage"]["prompt_tokens_details"]["cached_tokens"]
    # What is new, and the block in which it begins.
    assert second["usage"]["prompt_tokens"] - cached < 30 + 16
    assert content(second) == content(ask(nano, *turn, cache_salt=policy))
    time.sleep(1.5)  # the numbers come with the engine's next heartbeat
    assert metric(again, "mlx_lm_server:ssd_restored_tokens_total") > 0
    assert metric(again, "mlx_lm_server:ssd_loads_hit_total") > 0
    stop(again)
    assert nano.client.get("/health").json()["disk_tier"] is None
