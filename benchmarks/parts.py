"""The command line that all benchmark scripts share: parts by name, `--quick`, `--rounds`."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console

from benchmarks import claims
from benchmarks.claims import Claim

console = Console(highlight=False)

Findings = tuple[list[Claim], Any]


@dataclass(frozen=True, slots=True)
class Effort:
    """How much to measure."""

    is_quick: bool
    rounds: int


Part = Callable[[Effort], Findings]


def run_parts(
    script: str, parts: Mapping[str, Part], about: str | None, given: Sequence[str] | None = None
) -> int:
    """Run the parts asked for; the exit code is 1 where a claim was missed."""
    parser = argparse.ArgumentParser(
        description=about, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", metavar="part", help=f"of {', '.join(parts)}")
    parser.add_argument("--quick", action="store_true", help="small and short, to try it out")
    parser.add_argument("--rounds", type=int, help="default: 3, quick: 1")
    asked = parser.parse_args(given)
    for name in asked.parts:
        if name not in parts:
            parser.error(f"{name!r} is none of {', '.join(parts)}")
    effort = Effort(asked.quick, asked.rounds or (1 if asked.quick else 3))
    made = [_run(script, name, parts[name], effort) for name in asked.parts or parts]
    return 0 if all(made) else 1


def _run(script: str, name: str, part: Part, effort: Effort) -> bool:
    console.rule(f"{script} {name}: {part.__doc__}", align="left")
    made, details = part(effort)
    claims.show(f"{script} {name}", made, console)
    claims.save(f"{script}-{name}", made, details, is_quick=effort.is_quick)
    return all(claim.holds for claim in made)
