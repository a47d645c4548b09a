"""What the prefix cache saves: warm starts, conversations, prefixes in flight, full memory.

python -m benchmarks prefix [warm neighbours conversation shared oversubscribed] [--quick]
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from random import Random
from statistics import median
from time import perf_counter
from typing import Any

import httpx

from benchmarks import processes, reaper
from benchmarks.claims import Claim
from benchmarks.gaps import gaps_beside_cached
from benchmarks.models import ensure_models
from benchmarks.parts import Effort, Findings, console, run_parts
from benchmarks.serving import details, measure, no_errors, servers, shape_of
from mlx_lm_server.server.engines.engine_process import ENGINE_ENVIRONMENT

PREFIX_TOKENS, NEW_TOKENS = 2000, 20
HTTP_ALLOWANCE_S = 0.015
NEIGHBOURS_TOKENS = (3000, 10_000)
FIRST_ID, LAST_ID = 300, 8000


def child(mode: str, *arguments: int) -> dict[str, Any]:
    """A mode of `prefix_child`, in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.prefix_child", mode, *map(str, arguments)]
    with reaper.start(
        command, stdout=subprocess.PIPE, env=ENGINE_ENVIRONMENT | os.environ
    ) as process:
        out, _ = process.communicate()
    found: dict[str, Any] = json.loads(out.splitlines()[-1])
    console.print(f"  {mode} {arguments}: {found}")
    return found


def neighbours(effort: Effort) -> Findings:
    """The longest gap between the tokens of 4 streams while a cached conversation comes back."""
    model, rng = str(ensure_models()["float32"]), Random(0)
    made, found = [], {}
    with servers(processes.ours(model)) as [server]:
        for num_tokens in NEIGHBOURS_TOKENS:
            rounds = []
            for _ in range(effort.rounds + 1):  # the first one warms up
                prompts = _ids(rng, 128), _ids(rng, num_tokens)
                rounds.append(asyncio.run(gaps_beside_cached(server.url, *prompts)))
                told = "  ".join(f"{name} {s * 1e3:.1f}" for name, s in rounds[-1].items())
                console.print(f"  {num_tokens} cached tokens, in ms: {told}")
            found[str(num_tokens)] = rounds
            over = [one["beside_s"] / one["median_s"] for one in rounds[1:]]
            name = f"{num_tokens} cached tokens: longest gap beside them over median ITL"
            made.append(Claim(name, median(over), at_most=3.0))
    return made, found


def warm(effort: Effort) -> Findings:
    """TTFT of 20 new tokens after 2000 cached ones, against computing all, and the bare forward."""
    model = str(ensure_models()["float32"])
    rounds = []
    with (
        servers(processes.ours(model)) as [server],
        httpx.Client(base_url=server.url, timeout=120) as client,
    ):
        for number in range(effort.rounds + 1):  # the first one warms up
            forward_s = child("tail", PREFIX_TOKENS, NEW_TOKENS, 6)["forward_s"]
            rounds.append((forward_s, *_cold_and_warm_s(client, Random(number))))
    forward_s, cold_s, warm_s = (median(column) for column in zip(*rounds[1:], strict=True))
    over_bound = median(w / (1.25 * f + HTTP_ALLOWANCE_S) for f, _, w in rounds[1:])
    made = [
        Claim("warm TTFT over (1.25 x bare forward + 15 ms)", over_bound, at_most=1.0),
        Claim("cold TTFT over warm TTFT", cold_s / warm_s, at_least=12.0),
        Claim("warm TTFT", warm_s * 1e3, unit="ms"),
        Claim("bare forward of the new tokens", forward_s * 1e3, unit="ms"),
    ]
    return made, {"forward_cold_warm_s": rounds}


def _cold_and_warm_s(client: httpx.Client, rng: Random) -> tuple[float, float]:
    prefix = _ids(rng, PREFIX_TOKENS)
    cold_s, _ = _ttft(client, prefix + _ids(rng, NEW_TOKENS))
    warm = [_ttft(client, prefix + _ids(rng, NEW_TOKENS)) for _ in range(6)]
    assert min(cached for _, cached in warm) >= PREFIX_TOKENS // 16 * 16
    return cold_s, median(seconds for seconds, _ in warm)


def _ids(rng: Random, num_tokens: int) -> list[int]:
    return [rng.randrange(FIRST_ID, LAST_ID) for _ in range(num_tokens)]


def _ttft(client: httpx.Client, prompt: list[int]) -> tuple[float, int]:
    body = {"prompt": prompt, "max_tokens": 1, "temperature": 0}
    begun = perf_counter()
    answer = client.post("/v1/completions", json=body).raise_for_status().json()
    seconds = perf_counter() - begun
    return seconds, answer["usage"]["prompt_tokens_details"]["cached_tokens"]


def conversation(effort: Effort) -> Findings:
    """Five turns and shared prefixes, against `mlx_lm.server`."""
    model = str(ensure_models()["float32"])
    with servers(processes.ours(model), processes.peer(model)) as running:
        session = measure(
            running, ["shared-prefix", "conversation"], effort.rounds, shape_of(effort)
        )
    ttfts = {}
    for outcome in session.outcomes:
        if outcome.workload == "conversation":
            turns = [s for name, s in outcome.summary.extras.items() if name.startswith("turn")]
            ttfts[outcome.target.name] = median(turns)
    ours, theirs = ttfts.values()
    made = [
        Claim("conversation: median TTFT over mlx_lm.server's", ours / theirs, at_most=1 / 3),
        no_errors(session),
    ]
    return made, details(session)


def shared(effort: Effort) -> Findings:
    """16 requests with the same 1024-token prefix at once: what is computed."""
    found = child("shared", 1024, 32, 16)
    name = "tokens computed over (1.05 x prefix + suffixes)"
    return [Claim(name, found["over_needed"], at_most=1.0)], found


def oversubscribed(effort: Effort) -> Findings:
    """Twice as many requests as fit the memory."""
    sizes = (4, 64, 300) if effort.is_quick else (8, 128, 384)
    found = child("oversubscribed", *sizes)
    ratio = found["twice"] / found["fits"]
    return [Claim("throughput over that of what fits", ratio, at_least=0.9)], found


PARTS = {
    "warm": warm,
    "neighbours": neighbours,
    "conversation": conversation,
    "shared": shared,
    "oversubscribed": oversubscribed,
}

if __name__ == "__main__":
    raise SystemExit(run_parts("prefix", PARTS, __doc__))
