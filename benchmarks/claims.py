"""What the project claims, held against what was measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import msgspec
from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks import machine

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True, slots=True)
class Claim:
    """A number and the bound it has to keep; `bound` None: shown only."""

    name: str
    value: float
    at_least: float | None = None
    at_most: float | None = None
    unit: str = ""

    @property
    def holds(self) -> bool:
        above = self.at_least is None or self.value >= self.at_least
        return above and (self.at_most is None or self.value <= self.at_most)

    @property
    def bound(self) -> str:
        if self.at_least is not None:
            return f"≥ {self.at_least:g}"
        return f"≤ {self.at_most:g}" if self.at_most is not None else ""

    @property
    def verdict(self) -> str:
        if self.at_least is None and self.at_most is None:
            return ""
        return "[green]holds[/]" if self.holds else "[red]MISSED[/]"


def show(title: str, claims: Sequence[Claim], console: Console) -> None:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("claim")
    for column in ("measured", "bound", ""):
        table.add_column(column, justify="right", no_wrap=True)
    for claim in claims:
        value = f"{claim.value:.3g} {claim.unit}".strip()
        table.add_row(claim.name, value, claim.bound, claim.verdict)
    console.print(table)


def save(name: str, claims: Sequence[Claim], details: Any, *, is_quick: bool) -> Path:
    """Quick runs are for trying the command out; their numbers are kept apart."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}{'-quick' if is_quick else ''}.json"
    judged = [asdict(claim) | {"holds": claim.holds} for claim in claims]
    document = {"machine": machine.facts(), "claims": judged, "details": details}
    path.write_bytes(msgspec.json.format(msgspec.json.encode(document), indent=1) + b"\n")
    return path
