"""Decode at 16 rows against mlx-lm's batch_generate, for every kind of model.

    python -m benchmarks families [FAMILY … table] [--quick]

Both have the same OpenBLAS; "with small_gemm" has our products with few rows too. A family that
mlx-lm cannot batch is held against its generate, rows in turn. Rows are of different lengths. Each
contender is a process of its own with one thread; rounds are interleaved. Ratios are of the CPU
time of a step, medians over steps and rounds, so that a busy neighbour hardly shows.
Writes results/families-FAMILY.json; `table` prints what is written there as Markdown.
"""

from __future__ import annotations

from statistics import median
from typing import Any

import msgspec

from benchmarks import claims
from benchmarks.claims import Claim
from benchmarks.contenders.load import Load
from benchmarks.engine_loop import Rounds, interleave
from benchmarks.family_models import FAMILIES, ensure_family, num_parameters
from benchmarks.parts import Effort, Findings, Part, run_parts
from benchmarks.workers import workers

# Ours prefills in whole budgets: what counts is the time in which all rows decode.
OURS = "engine_unhurried"
CONTENDERS = (OURS, "batch_generate", "batch_generate_small_gemm")
PROMPT_TOKENS = range(96, 160, 4)
OUTPUT_TOKENS = 32
HEAD = (
    "| family | parameters | engine | ms a step | mlx-lm | ms a step | ratio | with small_gemm |",
    "|---|---|---|---|---|---|---|---|",
)


def part_of(family: str) -> Part:
    def measure(effort: Effort) -> Findings:
        return _measure(family, effort)

    measure.__doc__ = f"Decode of {len(PROMPT_TOKENS)} rows of {family} against mlx-lm."
    return measure


def _measure(family: str, effort: Effort) -> Findings:
    model = ensure_family(family)
    load = Load(tuple(PROMPT_TOKENS), 16 if effort.is_quick else OUTPUT_TOKENS, 0)
    with workers(*CONTENDERS, model=str(model), threads=1) as pool:
        rounds = interleave(pool, dict.fromkeys(CONTENDERS, load), effort.rounds)
        about = {name: worker.about for name, worker in pool.items()}
    row = {
        "family": family,
        "parameters": num_parameters(model),
        "about": msgspec.to_builtins(about),
        "step_cpu_ms": {name: _step_ms(rounds, name) for name in CONTENDERS},
        "over_batch_generate": _ratio(rounds, "batch_generate"),
        "over_small_gemm": _ratio(rounds, "batch_generate_small_gemm"),
    }
    for name, one in about.items():
        print(f"  {name:26} {_step_ms(rounds, name):6.1f} ms a step   {one.runs}; {one.blas}")
    found = [
        Claim(f"{family}: engine over batch_generate", row["over_batch_generate"], at_least=1.0),
        Claim(f"{family}: engine over batch_generate with small_gemm", row["over_small_gemm"]),
    ]
    return found, row | {"rounds": rounds}


def _step_ms(rounds: Rounds, name: str) -> float:
    return 1000 * median(one[name].step_cpu_p50_s for one in rounds)


def _ratio(rounds: Rounds, theirs: str) -> float:
    return median(one[theirs].step_cpu_p50_s / one[OURS].step_cpu_p50_s for one in rounds)


def table(effort: Effort) -> Findings:
    """What is in the results of all families, as Markdown."""
    end = "-quick" if effort.is_quick else ""
    paths = [claims.RESULTS / f"families-{family}{end}.json" for family in FAMILIES]
    rows = [msgspec.json.decode(path.read_bytes())["details"] for path in paths if path.exists()]
    print(*HEAD, *(_line(row) for row in rows), sep="\n")
    found = [Claim(f"{row['family']}", row["over_batch_generate"], at_least=1.0) for row in rows]
    return found, [{key: row[key] for key in row if key != "rounds"} for row in rows]


def _line(row: dict[str, Any]) -> str:
    about, times = row["about"], row["step_cpu_ms"]
    cells = [row["family"], f"{row['parameters'] / 1e6:.0f} M"]
    for name in (OURS, "batch_generate"):
        cells += [about[name]["runs"], f"{times[name]:.1f}"]
    cells += [f"{row['over_batch_generate']:.2f}", f"{row['over_small_gemm']:.2f}"]
    return "| " + " | ".join(cells) + " |"


PARTS: dict[str, Part] = {family: part_of(family) for family in FAMILIES} | {"table": table}


if __name__ == "__main__":
    raise SystemExit(run_parts("families", PARTS, __doc__))
