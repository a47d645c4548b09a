"""Many clients that come, ask, and often leave too early: what stays behind?

    python -m benchmarks soak [disconnects] [--quick]

32 clients for two minutes on nano, each with requests of its own length and sampling, streamed or
not, half of which are given up at a random moment. Then everything must be as it was: there is no
prefix cache, which would keep some of what they said.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections import Counter
from typing import Any

import httpx
import psutil

from benchmarks.claims import Claim
from benchmarks.parts import Effort, Findings, console, run_parts
from benchmarks.processes import Server, ours, running
from mlx_lm_server.runner.backends.host_memory import IDLE_BEFORE_TRIM_S

NUM_CLIENTS = 32
SETTLE_LIMIT_S = 30.0
WARM_UP_S = 10.0


class Crowd:
    """What the clients saw, counted."""

    def __init__(self, url: str) -> None:
        self._url = url
        self.seen: Counter[str] = Counter()

    async def run(self, duration_s: float) -> None:
        until = time.monotonic() + duration_s
        async with httpx.AsyncClient(timeout=60, limits=httpx.Limits(max_connections=None)) as http:
            await asyncio.gather(*(self._client(http, n, until) for n in range(NUM_CLIENTS)))

    async def _client(self, http: httpx.AsyncClient, number: int, until: float) -> None:
        rng = random.Random(number)
        while time.monotonic() < until:
            patience_s = rng.uniform(0.0, 1.0) if rng.random() < 0.5 else 60.0
            task = asyncio.create_task(self._ask(http, rng))
            done, _ = await asyncio.wait([task], timeout=patience_s)
            if not done:
                task.cancel()
                self.seen["given up"] += 1
                with contextlib.suppress(asyncio.CancelledError):
                    await task

    async def _ask(self, http: httpx.AsyncClient, rng: random.Random) -> None:
        body: dict[str, Any] = {
            "prompt": [rng.randrange(300, 2000) for _ in range(rng.choice((1, 20, 200, 900)))],
            "max_tokens": rng.choice((1, 8, 64, 200)),
            "temperature": rng.choice((0.0, 0.8, 1.3)),
            "top_p": rng.choice((1.0, 0.9)),
            "frequency_penalty": rng.choice((0.0, 0.5)),
            "stream": rng.random() < 0.7,
        }
        url = f"{self._url}/v1/completions"
        async with http.stream("POST", url, json=body) as answer:
            content = await answer.aread()
        is_whole = answer.status_code == 200 and b'"error"' not in content
        is_refused = answer.status_code in (429, 503)
        self.seen["answered" if is_whole else "refused" if is_refused else "failed"] += 1


def disconnects(effort: Effort) -> Findings:
    """Two minutes of 32 clients with random disconnects leave nothing behind."""
    with running(ours("nano", "--no-prefix-cache")) as server:
        asyncio.run(Crowd(server.url).run(WARM_UP_S))
        settle(server)
        before = held(server)
        crowd = Crowd(server.url)
        asyncio.run(crowd.run(8.0 if effort.is_quick else 120.0))
        health = settle(server)
        after = held(server)
        family = server.process.children(recursive=True)
    left = [process for process in family if process.is_running()]
    console.print(f"  {dict(crowd.seen)}, memory {before} → {after}")
    claims = [
        Claim("requests answered in full", crowd.seen["answered"], at_least=1),
        Claim("requests that failed", crowd.seen["failed"], at_most=0),
        Claim("rows left", health["num_running"] + health["num_waiting"], at_most=0),
        Claim("KV left", health["kv_used_bytes"], at_most=0, unit="bytes"),
        Claim("engine memory after over before", after["engine"] / before["engine"], at_most=1.25),
        Claim("server memory after over before", after["server"] / before["server"], at_most=1.25),
        Claim("processes left", len(left), at_most=0),
    ]
    return claims, {"seen": crowd.seen, "before": before, "after": after}


def settle(server: Server) -> dict[str, Any]:
    """Wait until nothing runs and the engine has given back what it does not need."""
    until = time.monotonic() + SETTLE_LIMIT_S
    while True:
        health: dict[str, Any] = httpx.get(f"{server.url}/health").json()
        if not health["num_running"] + health["num_waiting"] or time.monotonic() > until:
            time.sleep(IDLE_BEFORE_TRIM_S + 8.0)
            return httpx.get(f"{server.url}/health").json()  # type: ignore[no-any-return]
        time.sleep(0.2)


def held(server: Server) -> dict[str, int]:
    """Resident bytes of both processes."""
    engine: psutil.Process = server.engine
    return {"server": server.rss_bytes(), "engine": engine.memory_info().rss}


PARTS = {"disconnects": disconnects}


if __name__ == "__main__":
    raise SystemExit(run_parts("soak", PARTS, __doc__))
