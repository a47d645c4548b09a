"""Outcomes as a table for people and as JSON for programs."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from statistics import median
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from mlx_lm_server import __version__
from mlx_lm_server.bench.client import Target
from mlx_lm_server.bench.metrics import Spread, Summary, summarize, throughput
from mlx_lm_server.bench.session import Outcome, Session

NOTHING = "–"
LETTERS = "AB"
ITSELF = (
    "A and B are one server, asked different prompts of the same lengths: how far a ratio is from "
    "1 says how far two measurements of one thing differ."
)


def as_json(session: Session) -> dict[str, Any]:
    """Everything in the table and more; keys are stable. Times are seconds."""
    return {
        "version": __version__,
        "settings": dataclasses.asdict(session.settings),
        "targets": [_target_json(target) for target in session.targets],
        "results": [_outcome_json(outcome) for outcome in session.outcomes],
        "ratios": ratios(session.outcomes),
    }


def _target_json(target: Target) -> dict[str, Any]:
    return {"url": target.url, "model": target.model, "name": target.name}


def _outcome_json(outcome: Outcome) -> dict[str, Any]:
    return {
        "workload": outcome.workload,
        "target": outcome.target.name or outcome.target.url,
        "letter": LETTERS[outcome.place],
        **dataclasses.asdict(outcome.summary),
        "client_cpu_per_token_s": outcome.client_cpu_per_token_s,
        "rounds": [dataclasses.asdict(summarize([one])) for one in outcome.rounds],
    }


def ratios(outcomes: Sequence[Outcome]) -> dict[str, dict[str, float]]:
    """First target over second, by workload and number. Throughput: more is better; all else:
    less is better."""
    pairs = zip(outcomes[::2], outcomes[1::2], strict=False)
    return {a.workload: _ratio(a, b) for a, b in pairs if a.place != b.place}


def _ratio(ours: Outcome, theirs: Outcome) -> dict[str, float]:
    """Throughput is compared round by round, since only neighbours met the same machine."""
    ours_by_name, theirs_by_name = _numbers(ours.summary), _numbers(theirs.summary)
    ratio = {
        name: value / theirs_by_name[name]
        for name, value in ours_by_name.items()
        if theirs_by_name.get(name)
    }
    pairs = [
        (throughput(a), throughput(b)) for a, b in zip(ours.rounds, theirs.rounds, strict=False)
    ]
    by_round = [a / b for a, b in pairs if b > 0]
    return ratio | ({"output_tokens_per_s": median(by_round)} if by_round else {})


def _numbers(summary: Summary) -> dict[str, float]:
    numbers: dict[str, float | None] = {"output_tokens_per_s": summary.output_tokens_per_s}
    for name, spread in _spreads(summary).items():
        numbers |= {f"{name}_p50_s": spread.p50, f"{name}_p95_s": spread.p95}
    numbers["longest_gap_s"] = summary.longest_gap_s
    return {name: value for name, value in numbers.items() if value is not None}


def _spreads(summary: Summary) -> dict[str, Spread]:
    named = {"ttft": summary.ttft_s, "itl": summary.itl_s, "e2e": summary.e2e_s}
    return {name: spread for name, spread in named.items() if spread is not None}


def print_table(session: Session, console: Console) -> None:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("workload", no_wrap=True)
    for name in ("tok/s", "TTFT ms", "ITL ms", "E2E ms", "n", "err"):
        table.add_column(name, justify="right", no_wrap=True)
    for outcome in session.outcomes:
        if outcome.rounds:
            table.add_row(*_cells(outcome, session))
    console.print(table)
    console.print("TTFT, ITL, E2E: p50/p95/max", style="dim")
    if len(session.targets) > 1:
        console.print(_legend(session), style="dim", markup=False, highlight=False)
    _print_extras(session, console)
    _print_ratios(session, console)
    _print_notes(session, console)


def _cells(outcome: Outcome, session: Session) -> list[str]:
    summary = outcome.summary
    return [
        _label(outcome, session),
        f"{summary.output_tokens_per_s:.1f}",
        *(_milliseconds(s) for s in (summary.ttft_s, summary.itl_s, summary.e2e_s)),
        str(summary.num_requests),
        str(summary.num_errors),
    ]


def _milliseconds(spread: Spread | None) -> str:
    if spread is None:
        return NOTHING
    return "/".join(_millisecond(seconds) for seconds in (spread.p50, spread.p95, spread.max))


def _millisecond(seconds: float) -> str:
    """At most four characters: 1.5, 15, 1500, 15s."""
    if seconds >= 9.9995:
        return f"{seconds:.0f}s"
    return f"{seconds * 1e3:.{1 if seconds < 0.00995 else 0}f}"


def _print_extras(session: Session, console: Console) -> None:
    for outcome in session.outcomes:
        extras = outcome.summary.extras
        if extras:
            numbers = "  ".join(f"{name} {value:.3g}" for name, value in extras.items())
            console.print(f"{_label(outcome, session)}: {numbers}", highlight=False, soft_wrap=True)


def _print_ratios(session: Session, console: Console) -> None:
    for workload, numbers in ratios(session.outcomes).items():
        line = "  ".join(f"{name} {value:.2f}" for name, value in numbers.items())
        console.print(f"{workload}: A / B  {line}", highlight=False, soft_wrap=True)
    if session.compares_with_itself:
        console.print(ITSELF, style="dim", soft_wrap=True)


def _print_notes(session: Session, console: Console) -> None:
    for outcome in session.outcomes:
        summary, label = outcome.summary, _label(outcome, session)
        for error, count in summary.errors.items():
            console.print(f"[red]{label}[/]: {count} times: ", end="")
            console.print(error, markup=False, highlight=False)
        if summary.num_short:
            console.print(f"{label}: {summary.num_short} answers ended early", highlight=False)


def _label(outcome: Outcome, session: Session) -> str:
    if len(session.targets) == 1:
        return outcome.workload
    return f"{outcome.workload} {LETTERS[outcome.place]}"


def _legend(session: Session) -> str:
    pairs = zip(LETTERS, session.targets, strict=False)
    return "  ".join(f"{letter}: {target.name or target.url}" for letter, target in pairs)
