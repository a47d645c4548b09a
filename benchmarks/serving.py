"""Our server and `mlx_lm.server` as real processes under the same load, round by round in turn.

    python -m benchmarks.serving [throughput latency shipped loop start …] [--quick]

Without names all parts run. Each prints its table and claims and writes results/serving-PART.json.
"""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator, Sequence
from dataclasses import replace
from statistics import median
from typing import Any

import uvloop

from benchmarks import processes
from benchmarks.claims import Claim
from benchmarks.contenders.load import Load
from benchmarks.models import ensure_models
from benchmarks.parts import Effort, Findings, console, run_parts
from benchmarks.processes import Launch, Server
from benchmarks.workers import Worker, workers
from mlx_lm_server.bench.client import Target
from mlx_lm_server.bench.plans import Shape
from mlx_lm_server.bench.report import as_json, print_table, ratios
from mlx_lm_server.bench.session import Outcome, Session, Settings

THROUGHPUT_RATIOS = {"single": 1.05, "clients8": 1.2, "clients32": 1.4, "mixed": 1.8}
SHIPPED_RATIOS = {
    "float32": {"single": 1.9, "clients32": 14.0},
    "4bit": {"clients32": 12.0},
}


def shape_of(effort: Effort) -> Shape:
    if not effort.is_quick:
        return Shape()
    return Shape(
        64, 16, 1, 512, shared_tokens=128, turns=3, answer_tokens=64, idle_samples=2, busy_samples=3
    )


class Quiet:
    """A watcher that does nothing."""

    def round_started(self, outcome: Outcome, round_index: int) -> None: ...

    def round_ended(self, outcome: Outcome) -> None: ...


class Printer(Quiet):
    """A watcher that prints a line per round."""

    def round_ended(self, outcome: Outcome) -> None:
        summary, number = outcome.summary, len(outcome.rounds)
        rate = f"{summary.output_tokens_per_s:7.1f} tok/s"
        console.print(f"  {outcome.workload:14} {number} {outcome.target.name:26} {rate}")


@contextlib.contextmanager
def servers(*launches: Launch) -> Iterator[list[Server]]:
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(processes.running(launch)) for launch in launches]


def measure(
    running: Sequence[Server], workloads: Sequence[str], rounds: int, shape: Shape
) -> Session:
    targets = [Target(server.url, name=server.name) for server in running]
    settings = Settings(tuple(workloads), rounds, secrets.randbits(32), shape)
    session = Session(targets, settings, Printer())
    uvloop.run(session.run())
    print_table(session, console)
    return session


def details(session: Session) -> dict[str, Any]:
    """The session as JSON; ports say nothing, so targets go by name."""
    document = as_json(session)
    document["targets"] = [target.name for target in session.targets]
    return document


def no_errors(*sessions: Session) -> Claim:
    errors = sum(
        outcome.summary.num_errors
        for session in sessions
        for outcome in session.outcomes
        if outcome.target == session.targets[0]
    )
    return Claim("failed requests of ours", errors, at_most=0)


def ratio_claims(session: Session, bounds: dict[str, float], suffix: str = "") -> list[Claim]:
    rival = session.targets[1].name
    measured = ratios(session.outcomes)
    return [
        Claim(
            f"{workload}{suffix}: output tok/s over {rival}",
            measured[workload]["output_tokens_per_s"],
            at_least=bound,
        )
        for workload, bound in bounds.items()
    ]


def throughput(effort: Effort) -> Findings:
    """Whole workloads against `mlx_lm.server` with the same BLAS."""
    model = str(ensure_models()["float32"])
    with servers(processes.ours(model), processes.peer(model)) as running:
        session = measure(running, list(THROUGHPUT_RATIOS), effort.rounds, shape_of(effort))
    return [*ratio_claims(session, THROUGHPUT_RATIOS), no_errors(session)], details(session)


def latency(effort: Effort) -> Findings:
    """New requests and a long prompt beside decoders."""
    model = str(ensure_models()["float32"])
    with servers(processes.ours(model), processes.peer(model)) as running:
        session = measure(running, ["ttft", "long-prompt"], effort.rounds, shape_of(effort))
    outcomes = [o for o in session.outcomes if o.target == session.targets[0]]
    new, long = (outcome.summary.extras for outcome in outcomes)
    made = [
        Claim(
            "ttft: p95 beside 8 decoders over (2 idle TTFT + 2 steps)",
            new["ttft_over_bound"],
            at_most=1.0,
        ),
        Claim("long-prompt: longest gap over median ITL", long["gap_over_itl"], at_most=3.0),
        Claim(
            "long-prompt: longest gap before and after it over median ITL",
            long["calm_gap_max_s"] / long["calm_itl_p50_s"],
            at_most=3.0,
        ),
        Claim(
            "long-prompt: prefill speed over undisturbed", long["busy_prefill_share"], at_least=0.6
        ),
        no_errors(session),
    ]
    return made, details(session)


def shipped(effort: Effort) -> Findings:
    """Against `mlx_lm.server` as its wheel ships: one request a client, for it takes long."""
    shape = replace(shape_of(effort), num_requests=1)
    made: list[Claim] = []
    found = {}
    for variant, bounds in SHIPPED_RATIOS.items():
        model = str(ensure_models()[variant])
        with servers(processes.ours(model), processes.peer(model, has_blas=False)) as running:
            session = measure(running, list(bounds), 1, shape)
        made += [*ratio_claims(session, bounds, f" {variant}"), no_errors(session)]
        found[variant] = details(session)
    return made, found


def loop(effort: Effort) -> Findings:
    """Through HTTP against the engine stepped by hand, engine and server on a core each, and
    unpinned; what the server process spends on a token."""
    made: list[Claim] = []
    found = {}
    for is_pinned in (True, False):
        rounds = _loop_rounds(effort, is_pinned)
        label = "pinned" if is_pinned else "unpinned"
        over_loop = median(r["http_tokens_per_s"] / r["loop_tokens_per_s"] for r in rounds)
        cpu_ms = median(r["server_cpu_per_token_s"] for r in rounds) * 1e3
        at_least = 0.97 if is_pinned else None
        made += [
            Claim(f"{label}: HTTP over the engine loop, clients32", over_loop, at_least=at_least),
            Claim(f"{label}: server CPU per streamed token", cpu_ms, at_most=0.12, unit="ms"),
        ]
        found[label] = rounds
    return made, found


def _loop_rounds(effort: Effort, is_pinned: bool) -> list[dict[str, float]]:
    """The first round warms both up and is dropped. Rounds differ by 5 % either way, and a bound of
    3 % takes more of them."""
    num_rounds = 3 * effort.rounds if is_pinned else effort.rounds
    model = str(ensure_models()["float32"])
    threads = 1 if is_pinned else None
    options = ("--cpu-threads", "1") if is_pinned else ()
    with (
        keeping_affinity(),
        workers("engine", model=model, threads=threads) as pool,
        servers(processes.ours(model, *options)) as (server,),
    ):
        if is_pinned:
            _pin_apart(server, pool["engine"])
        rounds = [_loop_round(pool["engine"], server, effort) for _ in range(num_rounds + 1)]
    for one in rounds[1:]:
        console.print("  " + "  ".join(f"{name} {value:.4g}" for name, value in one.items()))
    return rounds[1:]


@contextlib.contextmanager
def keeping_affinity() -> Iterator[None]:
    """Children inherit our cores, so what is pinned in the block is set free after it."""
    cores = os.sched_getaffinity(0)
    try:
        yield
    finally:
        os.sched_setaffinity(0, cores)


def _pin_apart(server: Server, engine: Worker) -> None:
    """Server and load generator on the first core, whichever engine computes on the second."""
    first, second = sorted(os.sched_getaffinity(0))[:2]
    processes.pin(server.process, {first})
    processes.pin(server.engine, {second})
    engine.pin({second})
    os.sched_setaffinity(0, {first})


def _loop_round(engine: Worker, server: Server, effort: Effort) -> dict[str, float]:
    shape, clients = shape_of(effort), 32
    prompts = (shape.prompt_tokens,) * (clients * shape.num_requests)
    seed = secrets.randbits(32)
    by_hand = engine.measure(Load(prompts, shape.output_tokens, seed, num_in_flight=clients))
    settings = Settings(("clients32",), 1, seed, shape)
    session = Session([Target(server.url, name=server.name)], settings, Quiet())
    cpu_before_s = server.cpu_s()
    uvloop.run(session.run())
    summary = session.outcomes[0].summary
    return {
        "loop_tokens_per_s": by_hand.output_tokens_per_s,
        "http_tokens_per_s": summary.output_tokens_per_s,
        "server_cpu_per_token_s": (server.cpu_s() - cpu_before_s) / summary.output_tokens,
        "client_cpu_per_token_s": session.outcomes[0].client_cpu_per_token_s,
        "errors": summary.num_errors,
    }


def start(effort: Effort) -> Findings:
    """From the start of the process to /readyz, and the server process's memory."""
    found = []
    for _ in range(2 if effort.is_quick else 5):
        with processes.running(processes.ours("nano")) as server:
            idle_bytes = server.rss_bytes()
            _serve_some(server)
            found.append((server.start_to_ready_s, idle_bytes, server.rss_bytes()))
    start_s, idle, busy = (list(column) for column in zip(*found, strict=True))
    made = [
        Claim("nano: start to ready", median(start_s), at_most=4.0, unit="s"),
        Claim("server process when idle", max(idle) / 1e6, at_most=150, unit="MB"),
        Claim("server process after 32 clients", max(busy) / 1e6, at_most=150, unit="MB"),
    ]
    return made, {"start_to_ready_s": start_s, "idle_rss_bytes": idle, "busy_rss_bytes": busy}


def _serve_some(server: Server) -> None:
    shape = Shape(prompt_tokens=32, output_tokens=16, num_requests=1)
    settings = Settings(("clients32",), 1, secrets.randbits(32), shape)
    uvloop.run(Session([Target(server.url, name=server.name)], settings, Quiet()).run())


PARTS = {
    "throughput": throughput,
    "latency": latency,
    "shipped": shipped,
    "loop": loop,
    "start": start,
}


if __name__ == "__main__":
    raise SystemExit(run_parts("serving", PARTS, __doc__))
