"""What an engine's death costs, and what being ready for it costs.

    python -m benchmarks deaths [pause note] [--quick]

Writes results/deaths-PART.json.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from statistics import median
from time import perf_counter
from typing import Any

import httpx
import psutil

from benchmarks import processes
from benchmarks.claims import Claim
from benchmarks.large_model import ensure_large_model
from benchmarks.parts import Effort, Findings, console
from benchmarks.starts import read_s
from mlx_lm_server.core.plan import JoinedRow, RowWork, StepPlan
from mlx_lm_server.engine.told_steps import ToldSteps
from mlx_lm_server.protocol import SamplingParams
from mlx_lm_server.step_note import StepNote, open_note

# Tokens before the kill, and how many steps of the note are timed.
NUM_BEFORE, NUM_STEPS = 20, 20_000
# Until a standby has imported everything.
STANDBY_S = 4.0


def pause(effort: Effort) -> Findings:
    """From kill -9 to the next token of a stream, with a standby and without."""
    claims, rounds = [], {}
    models = {"nano": "nano"}
    if not effort.is_quick:
        models["411 M"] = str(ensure_large_model())
    for name, model in models.items():
        most_s = 2.0 if name == "nano" else read_s(model) + 3.0
        for options in (("--standby",), ("--no-standby",)):
            with processes.running(processes.ours(model, *options)) as server:
                pauses = [_pause_s(server.url) for _ in range(2 * effort.rounds)]
                held_mb = _standby_bytes(server.url, server.process) / 1e6
            told = f"{name}, {options[0]}"
            shown = "  ".join(f"{s:.2f}" for s in pauses)
            console.print(f"  {told:22} {shown} s, standby {held_mb:.0f} MB")
            has_standby = options[0] == "--standby"
            bound_s = most_s if has_standby else None
            claims.append(Claim(told, median(pauses), at_most=bound_s, unit="s"))
            if has_standby:
                claims.append(Claim(f"{name}: memory of a standby", held_mb, unit="MB"))
            rounds[told] = pauses
    return claims, rounds


def _pause_s(url: str) -> float:
    """Kills the engine in the middle of a stream."""
    time.sleep(STANDBY_S)
    body = {"prompt": "Once", "max_tokens": 2 * NUM_BEFORE, "ignore_eos": True, "stream": True}
    with httpx.Client(base_url=url, timeout=60) as client:
        engine = client.get("/health").json()["engine"]["pid"]
        with client.stream("POST", "/v1/completions", json={**body, "return_token_ids": True}) as s:
            events = _token_events(s.iter_lines())
            num_tokens = 0
            while num_tokens < NUM_BEFORE // 2:
                num_tokens += next(events)
            os.kill(engine, 9)
            longest_s = last_s = 0.0
            begun_s = perf_counter()
            for _ in events:  # what was under way comes at once
                now_s = perf_counter() - begun_s
                longest_s, last_s = max(longest_s, now_s - last_s), now_s
    return longest_s


def _token_events(lines: Iterator[str]) -> Iterator[int]:
    for line in lines:
        if line.startswith("data: {"):
            choices = json.loads(line[6:])["choices"]
            if num := sum(len(choice.get("token_ids") or ()) for choice in choices):
                yield num


def _standby_bytes(url: str, server: psutil.Process) -> int:
    """What only the standby holds; 0 where there is none."""
    time.sleep(STANDBY_S)
    engine = httpx.get(f"{url}/health").json()["engine"]["pid"]
    others = [child for child in server.children() if child.pid != engine]
    return sum(child.memory_full_info().uss for child in others)


def note(effort: Effort) -> Findings:
    """What it takes to write down whose step is submitted: the same rows, and others each time."""
    claims, rounds = [], {}
    for num_rows in (1, 32, 256):
        for kind in ("same", "other"):
            best_us = min(_note_us(num_rows, kind) for _ in range(effort.rounds))
            name = f"{num_rows} rows, {kind} ones"
            claims.append(Claim(name, best_us, at_most=100.0, unit="µs"))
            rounds[name] = best_us
    return claims, rounds


def _note_us(num_rows: int, kind: str) -> float:
    sampling = SamplingParams(max_tokens=9, seed=0)
    rows = range(num_rows)
    works = tuple(RowWork(row, 0, row, 5) for row in rows)
    joined = tuple(JoinedRow(f"chatcmpl-{row:032x}-0", row, (1,), (), sampling) for row in rows)
    told = ToldSteps(StepNote(open_note()))
    told.before(StepPlan(0, joined_rows=joined, decodes=works))
    some = works if kind == "same" else works[:-1]
    plans: list[Any] = [
        StepPlan(step, decodes=some if step % 4 < 2 else works) for step in range(4)
    ]
    begun_s = perf_counter()
    for step in range(NUM_STEPS):
        told.before(plans[step % 4])
    return (perf_counter() - begun_s) / NUM_STEPS * 1e6


PARTS = {"pause": pause, "note": note}
