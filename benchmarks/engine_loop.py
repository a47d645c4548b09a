"""The engine without HTTP: against bare loops and mlx-lm, with own sampling, with one long row.

    python -m benchmarks.engine_loop [speed replays sampling long-row long-prompt …] [--quick]

Each contender is a process of its own with the same BLAS; rounds are interleaved and ratios are
medians over the rounds. Writes results/engine-PART.json.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from statistics import median

import msgspec

from benchmarks.claims import Claim
from benchmarks.contenders.load import Load, Measured
from benchmarks.long_prompt import long_prompt
from benchmarks.models import ensure_models
from benchmarks.parts import Effort, Findings, console, run_parts
from benchmarks.workers import Worker, workers

CONTENDERS = ("engine", "bare", "batch_generate", "batch_generate_small_gemm", "plain")
# These two differ by less than rounds do, so they have more rounds of their own.
LOOPS = ("engine", "bare")
LOOP_ROUNDS = 3
ROWS = (1, 8, 32)
REPLAYED_ROWS = (1, 4, 8, 16, 32)
PROMPT_TOKENS = {1: 512, 8: 128, 32: 128}
LONG_ROW_TOKENS = 8193
NUM_SHORT_ROWS = 15
SHORT_ROW_TOKENS = 64

Rounds = list[dict[str, Measured]]


def interleave(pool: Mapping[str, Worker], loads: Mapping[str, Load], rounds: int) -> Rounds:
    """Each label's load on its worker, round by round. A label is a worker's name, or that and
    something after a space. The first round warms up and is dropped."""
    found: Rounds = []
    for index in range(rounds + 1):
        seed = secrets.randbits(32)
        one = {
            label: pool[label.split()[0]].measure(msgspec.structs.replace(load, seed=seed))
            for label, load in loads.items()
        }
        if index > 0:
            found.append(one)
    return found


def rate(measured: Measured, phase: str) -> float:
    if phase == "prefill":
        return measured.prefill_tokens_per_s
    return measured.decode_tokens_per_s


def ratio(rounds: Rounds, phase: str, ours: str, theirs: str) -> float:
    return median(rate(one[ours], phase) / rate(one[theirs], phase) for one in rounds)


def show(label: str, rounds: Rounds, phase: str) -> None:
    for name in rounds[0]:
        rates = sorted(rate(one[name], phase) for one in rounds)
        spread = f"{rates[0]:7.1f} … {rates[-1]:7.1f}"
        console.print(f"  {phase:8} {label:10} {name:16} {median(rates):8.1f} tok/s   {spread}")


def speed(effort: Effort) -> Findings:
    """Decode and prefill against a bare loop and `batch_generate`, at 1, 8 and 32 rows."""
    claims, found = [], {}
    with workers(*CONTENDERS, model=str(ensure_models()["float32"])) as pool:
        for rows in ROWS:
            prompts = (PROMPT_TOKENS[rows] // (4 if effort.is_quick else 1),) * rows
            loads = {
                "decode": Load(prompts, 12 if effort.is_quick else 64, 0),
                "prefill": Load(prompts, 1, 0),
            }
            for phase, load in loads.items():
                rounds = interleave(pool, dict.fromkeys(CONTENDERS, load), effort.rounds)
                show(f"{rows} rows", rounds, phase)
                claims += _speed_claims(rounds, phase, rows)
                found[f"{phase}-{rows}"] = rounds
                if phase == "decode":
                    num_rounds = LOOP_ROUNDS * effort.rounds
                    rounds = interleave(pool, dict.fromkeys(LOOPS, load), num_rounds)
                    claims.append(_loop_claim(rounds, rows))
                    found[f"loops-{rows}"] = rounds
    return claims, found


def _loop_claim(rounds: Rounds, rows: int) -> Claim:
    over_bare = ratio(rounds, "decode", *LOOPS)
    return Claim(f"decode, {rows} rows: engine over bare loop", over_bare, at_least=0.9)


def _speed_claims(rounds: Rounds, phase: str, rows: int) -> list[Claim]:
    over_mlx_lm = ratio(rounds, phase, "engine", "batch_generate")
    against = Claim(
        f"{phase}, {rows} rows: engine over batch_generate",
        over_mlx_lm,
        at_least=None if phase == "decode" and rows == 1 else 1.2,
    )
    small = ratio(rounds, phase, "engine", "batch_generate_small_gemm")
    shown = Claim(f"{phase}, {rows} rows: engine over batch_generate with our small_gemm", small)
    return [against, shown]


def replays(effort: Effort) -> Findings:
    """What replayed forwards give over building each anew: decode tok/s, and CPU time of a step."""
    claims, found = [], {}
    with workers("engine", "engine_building", model=str(ensure_models()["float32"])) as pool:
        for rows in REPLAYED_ROWS:
            load = Load((PROMPT_TOKENS[32],) * rows, 12 if effort.is_quick else 64, 0)
            rounds = interleave(pool, dict.fromkeys(pool, load), effort.rounds)
            show(f"{rows} rows", rounds, "decode")
            show_steps(f"{rows} rows", rounds)
            over_built = ratio(rounds, "decode", "engine", "engine_building")
            of_cpu = median(_cpu_ratio(one, "engine", "engine_building") for one in rounds)
            claims += [
                Claim(f"{rows} rows: replayed over built, tok/s", over_built),
                Claim(f"{rows} rows: replayed over built, CPU time of a step", of_cpu),
            ]
            found[f"rows-{rows}"] = rounds
    return claims, found


def sampling(effort: Effort) -> Findings:
    """What own temperature, top_p and seed of each row cost against greedy, V = 8192: CPU time of a
    step with one thread."""
    claims, found = [], {}
    model = str(ensure_models()["float32"])
    with workers("engine", "batch_generate", model=model, threads=1) as pool:
        for rows in (8, 32):
            greedy = Load((16,) * rows, 24 if effort.is_quick else 96, 0)
            own = msgspec.structs.replace(greedy, own_sampling=True)
            loads = {
                f"{name} {kind}": load
                for name in pool
                for kind, load in (("greedy", greedy), ("own", own))
            }
            rounds = interleave(pool, loads, effort.rounds)
            show(f"{rows} rows", rounds, "decode")
            show_steps(f"{rows} rows", rounds)
            for name in pool:
                more = median(_cpu_ratio(one, f"{name} own", f"{name} greedy") for one in rounds)
                bound = 1.15 if name == "engine" else None
                claims.append(
                    Claim(
                        f"{rows} rows: {name}, own sampling over greedy step", more, at_most=bound
                    )
                )
            found[f"rows-{rows}"] = rounds
    return claims, found


def show_steps(label: str, rounds: Rounds) -> None:
    for name in rounds[0]:
        steps_ms = sorted(one[name].step_cpu_p50_s * 1e3 for one in rounds)
        spread = f"{steps_ms[0]:7.2f} … {steps_ms[-1]:7.2f}"
        console.print(f"  CPU      {label:10} {name:22} {median(steps_ms):8.2f} ms/step {spread}")


def _cpu_ratio(one: dict[str, Measured], over: str, under: str) -> float:
    return one[over].step_cpu_p50_s / one[under].step_cpu_p50_s


def _step_ratio(one: dict[str, Measured], over: str, under: str) -> float:
    return one[over].step_p50_s / one[under].step_p50_s


def long_row(effort: Effort) -> Findings:
    """One long row beside 15 short ones against the same KV total spread evenly."""
    long_tokens = LONG_ROW_TOKENS // (8 if effort.is_quick else 1)
    uneven = (long_tokens, *(SHORT_ROW_TOKENS,) * NUM_SHORT_ROWS)
    even = (sum(uneven) // len(uneven),) * len(uneven)
    output_tokens = 32 if effort.is_quick else 64
    loads = {
        "engine_unhurried uneven": Load(uneven, output_tokens, 0),
        "engine_unhurried even": Load(even, output_tokens, 0),
    }
    with workers("engine_unhurried", model=str(ensure_models()["float32"])) as pool:
        rounds = interleave(pool, loads, effort.rounds)
    show("16 rows", rounds, "decode")
    step = median(_step_ratio(one, *loads) for one in rounds)
    peak = max(m.peak_bytes / m.live_kv_bytes for one in rounds for m in one.values())
    claims = [
        Claim("step with one long row over the same KV spread evenly", step, at_most=1.3),
        Claim("peak memory while decoding, without weights, over live KV", peak, at_most=1.3),
    ]
    return claims, {"rounds": rounds, "uneven": uneven, "even": even}


PARTS = {
    "speed": speed,
    "replays": replays,
    "sampling": sampling,
    "long-row": long_row,
    "long-prompt": long_prompt,
}


if __name__ == "__main__":
    raise SystemExit(run_parts("engine", PARTS, __doc__))
