"""What the cache on disk gives after a restart, and what it costs meanwhile.

python -m benchmarks restarts [ttft cost agent] [--quick]
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from statistics import median
from time import perf_counter
from typing import Any

import httpx

from benchmarks import processes
from benchmarks.claims import Claim
from benchmarks.models import ensure_models
from benchmarks.parts import Effort, Findings, console, run_parts
from benchmarks.prefix import FIRST_ID, LAST_ID, NEW_TOKENS, PREFIX_TOKENS
from benchmarks.processes import Launch, Server
from benchmarks.serving import details, measure, no_errors, servers, shape_of
from benchmarks.tier import cache_folder
from mlx_lm_server.bench.metrics import Summary, summarize
from mlx_lm_server.bench.report import ratios
from mlx_lm_server.bench.session import Session
from mlx_lm_server.bench.words import make_text

FLUSH_S = 1.0
MAX_GAP_MS = 20.0


def on_disk(folder: Path, *options: str) -> Launch:
    return processes.ours(
        str(ensure_models()["float32"]), *options, name="on disk", cache_dir=folder
    )


@dataclass(frozen=True, slots=True)
class Answer:
    ttft_s: float
    text: str
    prompt_tokens: int
    cached_tokens: int


def complete(client: httpx.Client, prompt: list[int], max_tokens: int = 1) -> Answer:
    body = {"prompt": prompt, "max_tokens": max_tokens, "temperature": 0}
    return _answer(client, "/v1/completions", body)


def _answer(client: httpx.Client, path: str, body: dict[str, Any]) -> Answer:
    """As the client sees it, less what came after the first token by the server's account."""
    begun = perf_counter()
    answer = client.post(path, json=body | {"timings": True}).raise_for_status().json()
    wall_s = perf_counter() - begun
    usage, choice = answer["usage"], answer["choices"][0]
    text = choice["message"]["content"] if "message" in choice else choice["text"]
    timings = usage["timings"]
    ttft_s = wall_s - (timings["total_s"] - timings["ttft_s"])
    cached = usage["prompt_tokens_details"]["cached_tokens"]
    return Answer(ttft_s, text, usage["prompt_tokens"], cached)


def ttft(effort: Effort) -> Findings:
    """TTFT of 20 new tokens after 2000: cold, warm in memory, and first after a restart."""
    rng = Random(13)

    def ids(num_tokens: int) -> list[int]:
        return [rng.randrange(FIRST_ID, LAST_ID) for _ in range(num_tokens)]

    rounds = []
    for _ in range(effort.rounds):
        prefixes = [ids(PREFIX_TOKENS) for _ in range(2 if effort.is_quick else 4)]
        with cache_folder() as folder:
            with processes.running(on_disk(folder)) as server, _client(server) as client:
                complete(client, ids(PREFIX_TOKENS))
                cold = [complete(client, p + ids(NEW_TOKENS)).ttft_s for p in prefixes]
                warm = [complete(client, p + ids(NEW_TOKENS)).ttft_s for p in prefixes]
            with processes.running(on_disk(folder)) as server, _client(server) as client:
                complete(client, ids(64))
                restored = [complete(client, p + ids(NEW_TOKENS)) for p in prefixes]
        assert all(answer.cached_tokens >= PREFIX_TOKENS // 16 * 16 for answer in restored)
        seconds = (median(cold), median(warm), median(a.ttft_s for a in restored))
        console.print("  cold {:.3f}  warm {:.3f}  restored {:.3f} s".format(*seconds))
        rounds.append(seconds)
    cold_s, warm_s, restored_s = (median(column) for column in zip(*rounds, strict=True))
    made = [
        Claim("TTFT after a restart over warm in memory", restored_s / warm_s, at_most=3.0),
        Claim("TTFT cold over after a restart", cold_s / restored_s, at_least=10.0),
        Claim("TTFT after a restart", restored_s * 1e3, unit="ms"),
    ]
    return made, {"rounds": rounds}


def _client(server: Server) -> httpx.Client:
    return httpx.Client(base_url=server.url, timeout=300)


def cost(effort: Effort) -> Findings:
    """Streams beside which all that is computed is written, against streams without a disk, both
    with the same number of threads: at their start they may choose differently. Round by round,
    since only neighbours met the same machine. And with several pairs of servers, since two of the
    same kind may differ by 8 % for as long as they live. No pair's files are removed before the
    end: for minutes after thousands of deletions an ext4 without a journal steps over their inodes,
    and a new file costs 0.3 to 0.6 ms there instead of 0.02."""
    model = str(ensure_models()["float32"])
    threads = ("--cpu-threads", str(len(os.sched_getaffinity(0))))
    workloads = ["clients8", "clients32", "ttft"]
    sessions, written, cpu_shares = [], 0, []
    with cache_folder() as folder:
        for number in range(2 * effort.rounds):
            launches = (
                on_disk(folder / str(number), "--ssd-policy", "write_through", *threads),
                processes.ours(model, *threads, name="in memory"),
            )
            with servers(*launches) as running:
                before_s = [server.engine_cpu_s() for server in running]
                sessions.append(measure(running, workloads, 2, shape_of(effort)))
                after_s = [server.engine_cpu_s() for server in running]
                disk_s, memory_s = (b - a for a, b in zip(before_s, after_s, strict=True))
                cpu_shares.append(disk_s / memory_s)
                written += _tier_facts(running[0].url)["bytes_written"]
    made = []
    for workload in workloads:
        shares = [ratios(one.outcomes)[workload]["output_tokens_per_s"] for one in sessions]
        gaps = [gap for one in sessions for gap in _longest_gaps(one, workload)]
        more = [(disk - memory) * 1e3 for disk, memory in gaps]
        console.print(f"  {workload}: throughput", "  ".join(f"{share:.3f}" for share in shares))
        console.print(f"  {workload}: longest gap", "  ".join(f"{ms:+.0f}" for ms in more), "ms")
        made += [
            Claim(
                f"{workload}: throughput over that without a disk", median(shares), at_least=0.95
            ),
            Claim(f"{workload}: longest gap", median(more), at_most=MAX_GAP_MS, unit="ms more"),
        ]
    console.print("  CPU time over that without a disk", *map("{:.3f}".format, cpu_shares))
    made += [Claim("engine's CPU time over that without a disk", median(cpu_shares))]
    made += [Claim("written", written / 1e6, unit="MB"), no_errors(*sessions)]
    return made, {"pairs": [details(one) for one in sessions]}


def _longest_gaps(session: Session, workload: str) -> Iterator[tuple[float, float]]:
    """Of each round of both targets; where newcomers come, of what they and calm steps cost
    streams that are under way, not of the start of all."""
    outcomes = [o for o in session.outcomes if o.workload == workload]
    for pair in zip(*(outcome.rounds for outcome in outcomes), strict=True):
        first, second = (summarize([traces]) for traces in pair)
        yield _longest_gap_s(first), _longest_gap_s(second)


def _longest_gap_s(summary: Summary) -> float:
    return summary.extras.get("disturbed_gap_max_s") or summary.longest_gap_s or 0.0


def _tier_facts(url: str) -> dict[str, Any]:
    facts: dict[str, Any] = httpx.get(f"{url}/health").json()["disk_tier"]
    return {name: value for name, value in facts.items() if name != "folder"}


@dataclass(frozen=True, slots=True)
class Turn:
    """`cached_tokens` of `prompt_tokens` were not computed."""

    number: int
    prompt_tokens: int
    cached_tokens: int
    ttft_s: float
    is_first_after_restart: bool


def agent(effort: Effort) -> Findings:
    """An agent's 20 turns on a prompt of 8000 tokens, with a restart half way: kill -9 with
    write_through, a graceful stop with evict_only."""
    made, found = [], {}
    for policy, end in (("write_through", kill), ("evict_only", stop_gracefully)):
        turns = _agent_turns(policy, end, effort)
        _print_turns(policy, turns)
        first, restarted = turns[0], next(t for t in turns if t.is_first_after_restart)
        later = [t for t in turns[1:] if not t.is_first_after_restart]
        new = [t.prompt_tokens - t.cached_tokens for t in turns[1:]]
        made += [
            Claim(f"{policy}: most tokens computed in a later turn", max(new), at_most=256),
            Claim(
                f"{policy}: TTFT after the restart over the median turn",
                restarted.ttft_s / median(t.ttft_s for t in later),
            ),
            Claim(
                f"{policy}: first TTFT over that after the restart",
                first.ttft_s / restarted.ttft_s,
            ),
        ]
        found[policy] = [asdict(turn) for turn in turns]
    return made, found


def kill(server: Server) -> None:
    """As a crash would: what was written within the flush interval may be lost."""
    time.sleep(FLUSH_S)
    for process in (server.engine, server.process):
        process.kill()


def stop_gracefully(server: Server) -> None:
    server.process.terminate()
    server.process.wait(processes.STOP_LIMIT_S)


def _agent_turns(policy: str, end: Callable[[Server], None], effort: Effort) -> list[Turn]:
    rng = Random(17)
    system_tokens, num_turns = (1000, 6) if effort.is_quick else (8000, 20)
    messages = [{"role": "system", "content": make_text(rng, system_tokens)}]
    turns: list[Turn] = []
    with cache_folder() as folder:
        for is_restarted in (False, True):
            launch = on_disk(folder, "--ssd-policy", policy)
            with processes.running(launch) as server, _client(server) as client:
                for index in range(num_turns // 2):
                    answer = _take_turn(client, messages, rng)
                    is_first = is_restarted and index == 0
                    sizes = (answer.prompt_tokens, answer.cached_tokens, answer.ttft_s)
                    turns.append(Turn(len(turns) + 1, *sizes, is_first_after_restart=is_first))
                end(server)
    return turns


def _take_turn(client: httpx.Client, messages: list[dict[str, str]], rng: Random) -> Answer:
    """What a tool gave back or a user asks, and the model's answer to it."""
    messages.append({"role": "user", "content": make_text(rng, rng.randrange(30, 150))})
    body = {"messages": messages, "max_tokens": 40, "temperature": 0}
    answer = _answer(client, "/v1/chat/completions", body)
    messages.append({"role": "assistant", "content": answer.text})
    return answer


def _print_turns(policy: str, turns: list[Turn]) -> None:
    console.print(f"  {policy}\n  turn  prompt  cached  computed  TTFT")
    for t in turns:
        mark = "  after the restart" if t.is_first_after_restart else ""
        computed = t.prompt_tokens - t.cached_tokens
        row = f"{t.number:4} {t.prompt_tokens:7} {t.cached_tokens:7} {computed:9}"
        console.print(f"  {row} {t.ttft_s * 1e3:6.0f} ms{mark}")


PARTS = {"ttft": ttft, "cost": cost, "agent": agent}

if __name__ == "__main__":
    raise SystemExit(run_parts("restarts", PARTS, __doc__))
