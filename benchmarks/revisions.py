"""This tree beside another revision of it, in the same run.

    BASE=<revision> python -m benchmarks revisions [cpu] [--quick]

Without BASE that is the commit before the last. Each measurement is a process of its own, with the
sources of its revision and the packages of this environment; rounds are interleaved. Writes
results/revisions-PART.json.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median

from benchmarks.claims import Claim
from benchmarks.models import ensure_models
from benchmarks.parts import Effort, Findings, console

ROOT = Path(__file__).parents[1]
MAX_RATIO = 1.05

Figures = dict[str, float]


def cpu(effort: Effort) -> Findings:
    """CPU seconds per 1000 tokens at 1, 8 and 32 rows and with prompts that come late."""
    model = str(ensure_models()["float32"])
    rounds: list[dict[str, Figures]] = []
    with _sources_of(os.environ.get("BASE", "HEAD~1")) as (base, revision):
        trees = {"base": base, "this": ROOT / "src"}
        for _ in range(effort.rounds):
            rounds.append({name: _measured(tree, model, effort) for name, tree in trees.items()})
            console.print(f"  {json.dumps(rounds[-1])}")
    claims = []
    for load in rounds[0]["this"]:
        mine, theirs = (median(one[name][load] for one in rounds) for name in ("this", "base"))
        console.print(f"  {load:8} {revision} {theirs:6.2f} s, this {mine:6.2f} s")
        claims.append(Claim(f"{load}: over {revision}", mine / theirs, at_most=MAX_RATIO))
    return claims, {"base": revision, "rounds": rounds}


def _measured(sources: Path, model: str, effort: Effort) -> Figures:
    child = Path(__file__).with_name("revisions_child.py")
    done = subprocess.run(
        [sys.executable, str(child), model, "8" if effort.is_quick else "1"],
        env=os.environ | {"PYTHONPATH": str(sources)},
        capture_output=True,
        text=True,
        check=True,
    )
    found: Figures = json.loads(done.stdout.splitlines()[-1])
    return found


@contextmanager
def _sources_of(revision: str) -> Iterator[tuple[Path, str]]:
    """Gives the `src` of a revision, and its short name, for as long as it is entered."""
    git = ["git", "-C", str(ROOT)]
    name = subprocess.check_output([*git, "rev-parse", "--short", revision], text=True).strip()
    with tempfile.TemporaryDirectory() as folder:
        archive = subprocess.run([*git, "archive", name, "src"], check=True, capture_output=True)
        subprocess.run(["tar", "-x", "-C", folder], input=archive.stdout, check=True)
        yield Path(folder) / "src", name


PARTS = {"cpu": cpu}
