"""A conversation outlives its server: stopped gracefully, or killed when all is written through."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from .conftest import Nano
from .test_prefix_cache import ask, metric


def stop(nano: Nano) -> None:
    assert nano.stop() == 0


def kill(nano: Nano) -> None:
    """Server and engine, at once, a second after the last answer."""
    time.sleep(1.2)
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
    assert first.client.get("/health").json()["disk_tier"]["folder"]
    ends(first)

    again = start("again.log")
    turn = (question, said, "And of Spain?")
    second = ask(again, *turn)
    cached = second["usage"]["prompt_tokens_details"]["cached_tokens"]
    assert second["usage"]["prompt_tokens"] - cached < 30
    assert content(second) == content(ask(nano, *turn, cache_salt=policy))
    time.sleep(0.3)
    ask(again, "Hello!")
    assert metric(again, "mlx_lm_server:ssd_restored_tokens_total") > 0
    assert metric(again, "mlx_lm_server:ssd_loads_hit_total") > 0
    stop(again)
    assert nano.client.get("/health").json()["disk_tier"] is None
