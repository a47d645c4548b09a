"""The gaps between the tokens of some streams while something else is asked of the server."""

from __future__ import annotations

import asyncio
import http.client
import json
from collections.abc import Awaitable
from itertools import pairwise
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

    def __init__(self, url: str) -> None:
        self._url = url
        self.times: list[list[float]] = [[] for _ in range(NUM_STREAMS)]

    async def run(self, index: int, client: httpx.AsyncClient) -> None:
        body = {"prompt": "One", "stream": True, "max_tokens": 3000, "ignore_eos": True}
        while True:
            async with client.stream("POST", f"{self._url}/v1/completions", json=body) as answer:
                async for _ in answer.aiter_raw():
                    self.times[index].append(perf_counter())

    async def longest_gap_s(self, while_: Awaitable[None]) -> float:
        """Between two events of a stream, while something else is awaited and shortly after."""
        self.times = [times[-1:] for times in self.times]
        await while_
        await asyncio.sleep(AFTER_S)
        return max(b - a for times in self.times for a, b in pairwise(times))


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
    async with httpx.AsyncClient(timeout=60) as client:
        tasks = [asyncio.create_task(streams.run(i, client)) for i in range(NUM_STREAMS)]
        await asyncio.sleep(1)
        for _ in range(rounds):
            found["nothing"].append(await streams.longest_gap_s(asyncio.sleep(AFTER_S)))
            for name, (path, _) in PROBES.items():
                asking = asyncio.to_thread(ask, url, path, bodies[name])
                found[name].append(await streams.longest_gap_s(asking))
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    return found
