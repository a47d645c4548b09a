"""The gaps between the tokens of some streams while something else is asked of the server."""

from __future__ import annotations

import asyncio
import http.client
import json
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager
from itertools import pairwise
from statistics import median
from time import perf_counter
from typing import Any
from urllib.parse import urlsplit

import httpx

NUM_STREAMS = 4
AFTER_S = 0.2
NUM_CHARS = 100_000
SENTENCE = "The sun rises in the east, and the river runs to the sea. "
LONG = (SENTENCE * (NUM_CHARS // len(SENTENCE) + 1))[:NUM_CHARS]
TURNS = [
    {"role": "assistant" if i % 2 else "user", "content": SENTENCE}
    for i in range(NUM_CHARS // len(SENTENCE))
]
# nano's context is shorter than that, so what is generated from is refused once it is tokenised,
# and what is seen is the server's work alone.
PROBES: dict[str, tuple[str, dict[str, Any]]] = {
    "completion": ("/v1/completions", {"prompt": LONG}),
    "chat": ("/v1/chat/completions", {"messages": [{"role": "user", "content": LONG}]}),
    "many turns": ("/v1/chat/completions", {"messages": TURNS}),
    "tokenize": ("/tokenize", {"prompt": LONG, "return_token_strs": True}),
    "detokenize": ("/detokenize", {"tokens": [200 + i % 2000 for i in range(NUM_CHARS // 4)]}),
}


class Streams:
    """Some streams that never end, and when each of their events came."""

    def __init__(self, url: str, prompt: str | list[int] = "One") -> None:
        self._url = url
        self._body = {"prompt": prompt, "stream": True, "max_tokens": 3000, "ignore_eos": True}
        self.times: list[list[float]] = [[] for _ in range(NUM_STREAMS)]

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        async with httpx.AsyncClient(timeout=60) as client:
            tasks = [asyncio.create_task(self._run(i, client)) for i in range(NUM_STREAMS)]
            await asyncio.sleep(1)
            yield
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _run(self, index: int, client: httpx.AsyncClient) -> None:
        url = f"{self._url}/v1/completions"
        while True:
            async with client.stream("POST", url, json=self._body) as answer:
                async for _ in answer.aiter_raw():
                    self.times[index].append(perf_counter())

    async def longest_gap_s(self, while_: Awaitable[None]) -> float:
        """Between two events of a stream, while something else is awaited and shortly after."""
        self.times = [times[-1:] for times in self.times]
        await while_
        await asyncio.sleep(AFTER_S)
        return max(self._gaps_s())

    def median_gap_s(self) -> float:
        """Of those that `longest_gap_s` looked at last."""
        return median(self._gaps_s())

    def _gaps_s(self) -> list[float]:
        return [b - a for times in self.times for a, b in pairwise(times)]


def ask(url: str, path: str, body: bytes) -> None:
    """On a thread, and without a look at the answer, so that this process is no bottleneck."""
    link = http.client.HTTPConnection(urlsplit(url).netloc)
    link.request("POST", path, body, {"content-type": "application/json"})
    link.getresponse().read()
    link.close()


async def gaps_beside(url: str, rounds: int) -> dict[str, list[float]]:
    """The longest gap in seconds beside each probe and beside `nothing`, round by round in turn."""
    streams = Streams(url)
    found: dict[str, list[float]] = {"nothing": [], **{name: [] for name in PROBES}}
    bodies = {name: json.dumps(body).encode() for name, (_, body) in PROBES.items()}
    async with streams.running():
        for _ in range(rounds):
            found["nothing"].append(await streams.longest_gap_s(asyncio.sleep(AFTER_S)))
            for name, (path, _) in PROBES.items():
                asking = asyncio.to_thread(ask, url, path, bodies[name])
                found[name].append(await streams.longest_gap_s(asking))
    return found


async def gaps_beside_cached(
    url: str, prompt: list[int], other_prompt: list[int]
) -> dict[str, float]:
    """Seconds between tokens of streams after one prompt: their median, the longest with nothing
    else there, and the longest beside an answer to another prompt, which is cached by then."""
    question = {"prompt": other_prompt, "max_tokens": 12, "temperature": 0, "ignore_eos": True}
    body = json.dumps(question).encode()
    await asyncio.to_thread(ask, url, "/v1/completions", body)
    streams = Streams(url, prompt)
    async with streams.running():
        quiet_s = await streams.longest_gap_s(asyncio.sleep(1))
        median_s = streams.median_gap_s()
        beside_s = await streams.longest_gap_s(asyncio.to_thread(ask, url, "/v1/completions", body))
    return {"median_s": median_s, "quiet_s": quiet_s, "beside_s": beside_s}
