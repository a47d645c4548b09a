"""What K and V in 8 and 4 bits save, take and lose.

    python -m benchmarks kv-bits [memory step quality] [--quick]

Everything is measured in processes of their own, with one thread. Steps of all widths take turns in
one process and are counted in CPU time, so that a busy neighbour hardly shows.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from statistics import median
from typing import Any

from benchmarks import reaper
from benchmarks.claims import Claim
from benchmarks.models import ensure_models
from benchmarks.parts import Effort, Findings, console, run_parts
from mlx_lm_server.server.engines.engine_process import ENGINE_ENVIRONMENT

ROWS, ROW_TOKENS = 32, 1000
STEP_ROWS = 16
STEP_BOUNDS = {256: 1.15, 2048: None}
QUALITY_BOUNDS = {"8-bit": 0.005, "4-bit": 0.03}
FORMATS = ("float32", "float32-8", "float32-4", "bfloat16", "bfloat16-8", "bfloat16-4")


def memory(effort: Effort) -> Findings:
    """Growth of a process by 32 rows of 1000 tokens, laid out as the engine does."""
    rows = 8 if effort.is_quick else ROWS
    found = {name: _child("memory", name, str(rows)) for name in FORMATS}
    claims = []
    for name, one in found.items():
        account, process = one["account_bytes"] / 2**20, one["process_bytes"] / 2**20
        console.print(f"  {name:11} account {account:7.1f} MiB   process {process:7.1f} MiB")
        plain, _, bits = name.partition("-")
        if not bits:
            continue
        share = one["process_bytes"] / found[plain]["process_bytes"]
        bound = {"float32-8": 0.29, "bfloat16-8": 0.54}.get(name)
        claims.append(Claim(f"process memory of {bits}-bit KV over {plain}'s", share, None, bound))
    return claims, found


def step(effort: Effort) -> Findings:
    """Decode step of 16 rows with 8 and 4 bits over float32, at two contexts."""
    claims, found = [], {}
    for context, bound in STEP_BOUNDS.items():
        repeats = 3 if effort.is_quick else 5 * effort.rounds
        one = _child("step", str(ensure_models()["float32"]), str(context), str(repeats))
        found[str(context)] = one
        for bits in ("8", "4"):
            steps = zip(one[bits], one["16"], strict=True)
            ratio = median(packed / plain for packed, plain in steps)
            name = f"step at context {context}: {bits}-bit over float32"
            claims.append(Claim(name, ratio, at_most=bound))
        times = {name: f"{median(ms):.1f} ms" for name, ms in one.items()}
        console.print(f"  context {context:5}   CPU time of a step {times}")
    return claims, found


def quality(effort: Effort) -> Findings:
    """Logits and perplexity of nano on held-out text, against K and V as they are."""
    found = _child("quality", str(4 if effort.is_quick else 25))
    plain = found["plain"]["perplexity"]
    console.print(f"  {found['num_tokens']} tokens, perplexity {plain:.4f}")
    console.print("  | KV | bytes per token | mean difference of logits | of perplexity |")
    claims = []
    for name, one in found["kinds"].items():
        more = one["perplexity"] / plain - 1
        cells = (name, one["bytes_per_token"], f"{one['logits']:.2%}", f"{more:+.3%}")
        console.print("  | " + " | ".join(map(str, cells)) + " |")
        bound = QUALITY_BOUNDS.get(name.partition(",")[0])
        claims.append(Claim(f"{name}: perplexity off by", 100 * abs(more), None, 100 * bound, "%"))
        claims.append(Claim(f"{name}: logits off by", 100 * one["logits"], unit="%"))
    return claims, found


def _child(*given: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.kv_bits_child", *given]
    environment = ENGINE_ENVIRONMENT | os.environ
    child = reaper.start(command, stdout=subprocess.PIPE, env=environment)
    printed, _ = child.communicate()
    if child.returncode:
        raise subprocess.CalledProcessError(child.returncode, command)
    found: dict[str, Any] = json.loads(printed.splitlines()[-1])
    return found


PARTS = {"memory": memory, "step": step, "quality": quality}


if __name__ == "__main__":
    raise SystemExit(run_parts("kv-bits", PARTS, __doc__))
