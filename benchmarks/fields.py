"""What the fields of requests cost, and that a seed keeps its word.

    python -m benchmarks fields [logprobs seeds reading long-prompt] [--quick]

Rounds are interleaved and ratios are medians over the rounds. Writes results/fields-PART.json.
"""

from __future__ import annotations

import json
import subprocess
import sys
from statistics import median

import uvloop

from benchmarks import processes
from benchmarks.claims import Claim
from benchmarks.contenders.load import Load
from benchmarks.engine_loop import interleave, show
from benchmarks.gaps import PROBES, gaps_beside
from benchmarks.models import ensure_models
from benchmarks.parts import Effort, Findings, console, run_parts
from benchmarks.reading import time_reading
from benchmarks.workers import workers

NUM_ROWS = 16
NUM_STREAMS = 32
NUM_MIXES = 200


def logprobs(effort: Effort) -> Findings:
    """Steps of 16 rows of which one asks for logprobs, over those of which none does."""
    tokens = 32 if effort.is_quick else 128
    loads = {
        f"engine {name}": Load((16,) * NUM_ROWS, tokens, 0, num_scored=num_scored)
        for name, num_scored in (("none", 0), ("one", 1), ("all", NUM_ROWS))
    }
    with workers("engine", model=str(ensure_models()["float32"])) as pool:
        rounds = interleave(pool, loads, max(effort.rounds, 5))
    show(f"{NUM_ROWS} rows", rounds, "decode")

    def over_none(name: str) -> float:
        steps = [(one[f"engine {name}"], one["engine none"]) for one in rounds]
        return median(ours.step_p50_s / plain.step_p50_s for ours, plain in steps) - 1

    claims = [
        Claim(f"logprobs on 1 of {NUM_ROWS} rows: longer steps", over_none("one"), at_most=0.03),
        Claim(f"logprobs on all of {NUM_ROWS} rows: longer steps", over_none("all")),
    ]
    return claims, rounds


def seeds(effort: Effort) -> Findings:
    """One request in random batches: how often it gets the tokens that it gets alone."""
    num_mixes = 20 if effort.is_quick else NUM_MIXES
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.seeds", str(num_mixes)],
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(done.stderr)
    found = json.loads(done.stdout)
    console.print(f"  {found['num_same']} of {found['num_mixes']} mixes, {found['num_rows']} rows")
    share = found["num_same"] / found["num_mixes"]
    return [Claim(f"same tokens in {num_mixes} random mixes", share, at_least=1.0)], found


def reading(effort: Effort) -> Findings:
    """Detokenise and parse the answers of 32 streams, one token of each at a time."""
    rounds = [time_reading(NUM_STREAMS) for _ in range(3 if effort.is_quick else 9)]
    claims = []
    for name in rounds[0]:
        per_token_us = min(one[name] for one in rounds) * 1e6
        spread = " … ".join(f"{find(one[name] for one in rounds) * 1e6:.1f}" for find in (min, max))
        console.print(f"  {name:36} {spread} µs a token")
        claims.append(Claim(f"{name}: least time a token", per_token_us, at_most=40, unit="µs"))
    return claims, rounds


def long_prompt(effort: Effort) -> Findings:
    """What a request of 100 000 characters adds to the gaps between the tokens of other streams."""
    rounds = 6 if effort.is_quick else 40
    with processes.running(processes.ours("nano", name="nano")) as server:
        found = uvloop.run(gaps_beside(server.url, rounds))
    claims = []
    for name, longest_s in found.items():
        spread = f"{min(longest_s) * 1e3:6.1f} … {max(longest_s) * 1e3:6.1f}"
        console.print(
            f"  beside {name:12} longest gap {median(longest_s) * 1e3:6.1f} ms   {spread}"
        )
    for name in PROBES:
        pairs = zip(found[name], found["nothing"], strict=True)
        added_ms = median(beside_s - quiet_s for beside_s, quiet_s in pairs) * 1e3
        claims.append(Claim(f"{name}: added to the longest gap", added_ms, at_most=20, unit="ms"))
    return claims, found


PARTS = {"logprobs": logprobs, "seeds": seeds, "reading": reading, "long-prompt": long_prompt}


if __name__ == "__main__":
    raise SystemExit(run_parts("fields", PARTS, __doc__))
