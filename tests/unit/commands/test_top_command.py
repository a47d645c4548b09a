"""Frames of `top`, from expositions as a server writes them."""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
from rich.console import Console

from mlx_lm_server.commands.running_server import RefusedError, UnreachableError
from mlx_lm_server.commands.top.cli import watched
from mlx_lm_server.commands.top.frame import frame
from mlx_lm_server.commands.top.scrape import Interval, Scrape, samples_of
from mlx_lm_server.protocol import EngineStats
from mlx_lm_server.server.engines.metrics import Metrics
from mlx_lm_server.tier_stats import TierCounters, TierStats

HEALTH: dict[str, Any] = {
    "status": "ok",
    "reason": "",
    "model": "nano",
    "engine": {
        "state": "ready",
        "pid": 42,
        "device": "CPU",
        "way": "plain",
        "batching": "packed",
        "kv_format": "float32",
        "submission": "late",
    },
    "max_batch_size": 32,
    "max_queue_size": 128,
    "kv_used_bytes": 5_000_000,
    "kv_limit_bytes": 10_000_000,
    "memory_pressure": "normal",
}


def stats(**changes: Any) -> EngineStats:
    numbers = [4, 0, 5_000_000, 10_000_000, 0, 0, 0, 0, 0, 0.0, 0.0, 0.0, 0]
    return EngineStats(*numbers, **changes)


@dataclass
class Server:
    """Writes its numbers as the real one does."""

    metrics: Metrics = field(default_factory=lambda: Metrics("nano"))
    engine: EngineStats = field(default_factory=stats)

    def at(self, at_s: float, **health: Any) -> Scrape:
        self.metrics.engine_stats = lambda: self.engine
        self.metrics.num_live = lambda: 7
        text = self.metrics.exposition().decode()
        return Scrape(at_s, samples_of(text), HEALTH | health)


def shown(interval: Interval, trouble: str = "") -> str:
    output = io.StringIO()
    Console(file=output, width=120).print(frame(interval, trouble=trouble, when="12:00:00"))
    return output.getvalue()


def test_speeds_are_of_the_time_between_two_looks() -> None:
    server = Server()
    before = server.at(10.0)
    server.metrics.generation_tokens += 500
    server.metrics.prompt_tokens += 30
    server.metrics.time_to_first_token_s.observe(0.25)
    server.metrics.prefix_cache_queries += 100
    server.metrics.prefix_cache_hits += 80
    text = shown(Interval(before, server.at(12.0)))
    assert "250 generated  15 of prompts" in text
    assert "250.0 ms to the first token  – between tokens" in text
    assert "80% of prompt tokens found" in text


def test_rows_queue_memory_and_engine_are_shown() -> None:
    text = shown(Interval(None, Server().at(0.0)))
    for words in (
        "4 of 32",
        "3 of 128",
        "50% of the KV memory",
        "5.0 MB of 10.0 MB",
        "pid 42",
        "way plain  packed  K and V float32  submitted late",
        "nano  ok  12:00:00",
    ):
        assert words in text
    assert "– generated" in text
    assert "disk" not in text


def test_the_disk_tier_is_shown_where_there_is_one() -> None:
    tier = TierStats(
        TierCounters(loads=4, loads_hit=3), used_bytes=2 * 10**9, limit_bytes=50 * 10**9
    )
    server = Server(engine=stats(tier=tier))
    text = shown(Interval(server.at(0.0), server.at(1.0)))
    assert "2.0 GB of 50.0 GB" in text
    assert "3 of 4 reads good" in text


def test_a_server_that_was_started_anew_has_no_negative_speed() -> None:
    server = Server()
    server.metrics.generation_tokens = 900
    text = shown(Interval(server.at(0.0), Server().at(1.0)))
    assert "– generated" in text


def test_a_state_that_is_not_good_comes_with_its_reason() -> None:
    engine = {"engine": {"state": "backoff"}}
    text = shown(Interval(None, Server().at(0.0, status="degraded", reason="no engine", **engine)))
    assert "degraded  no engine" in text
    assert "backoff" in text
    assert "trying again" in shown(Interval(None, Server().at(0.0)), trouble="nobody answers")


def test_a_server_without_health_is_shown_without() -> None:
    scrape = Server().at(0.0)
    assert "4" in shown(Interval(None, Scrape(0.0, scrape.samples)))


@pytest.mark.parametrize("text", ["<html>", "up 1\n", ""])
def test_what_is_no_exposition_of_ours_is_told(text: str) -> None:
    with pytest.raises(UnreachableError):
        samples_of(text)


def looks_of(*found: Scrape | Exception) -> Iterator[tuple[Interval, str]]:
    left = iter(found)

    def look() -> Scrape:
        one = next(left)
        if isinstance(one, Exception):
            raise one
        return one

    return watched(look, 0.0)


def test_a_server_that_goes_away_is_asked_until_it_answers() -> None:
    server = Server()
    first, second, third = (server.at(at_s) for at_s in (0.0, 5.0, 6.0))
    gone, busy = UnreachableError("nobody answers"), RefusedError("not yet", 502)
    looks = looks_of(first, gone, busy, second, third)
    seen = [next(looks) for _ in range(5)]
    assert [trouble for _, trouble in seen] == ["", "nobody answers", "not yet", "", ""]
    assert seen[1][0].now is first
    assert seen[3][0] == Interval(None, second)
    assert seen[4][0] == Interval(second, third)


def test_a_server_that_never_answered_or_lets_nobody_in_ends_it() -> None:
    with pytest.raises(UnreachableError):
        next(looks_of(UnreachableError("nobody answers")))
    looks = looks_of(Server().at(0.0), RefusedError("no key", 401))
    next(looks)
    with pytest.raises(RefusedError):
        next(looks)
