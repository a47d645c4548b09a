"""Tests the families of models against the newest mlx-lm and says in sentences what moved.

    python -m tests.contract.newest [--backend cpu | cuda12 | cuda13] [--python PYTHON]

The newest mlx-lm and mlx, pre-releases too and whatever bounds this project sets, are installed in
an environment of their own in a scratch folder. There the contract tests and the tests of families
run, and the table of models is made anew and compared with `docs/reference/models.md`. The exit
code is 1 where a test failed or a family is served worse than the table says. With `--python` an
environment that is there already is used as it is. Needs nothing but Python itself.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
TABLE = ROOT / "docs" / "reference" / "models.md"
TESTS = (
    "tests/contract",
    "tests/mlx/test_families.py",
    "tests/mlx/test_parity.py",
    "tests/mlx/test_half_precision.py",
    "tests/mlx/test_memory_of_kinds.py",
)
PACKAGES = ("mlx-lm", "mlx", "transformers")
VERSIONS = "import sys; from importlib.metadata import version; print(*map(version, sys.argv[1:]))"
WAYS = ("packed", "split", "alone", "not loaded")  # the best first


@dataclass(frozen=True)
class Served:
    """A row of the table of models."""

    way: str
    keeps: str
    reason: str

    @property
    def rank(self) -> int:
        return WAYS.index(self.way)


def newest_environment(folder: Path, backend: str) -> Path:
    """Its Python. Our own bounds are met first and overruled then, so that nothing else moves."""
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    python = folder / "bin" / "python"
    _install(python, "-e", f"{ROOT}[{backend},dev]")
    mlx = "mlx" if sys.platform == "darwin" else f"mlx[{backend}]"
    _install(python, "--upgrade", "--pre", "mlx-lm", mlx)
    return python


def _install(python: Path, *what: str) -> None:
    subprocess.run([str(python), "-m", "pip", "install", "--quiet", *what], check=True)


def failures(report: str) -> Iterator[str]:
    """A sentence for each failed test of a JUnit report."""
    for case in ElementTree.fromstring(report).iter("testcase"):
        for problem in (*case.findall("failure"), *case.findall("error")):
            name = case.get("name", "").removeprefix("test_").replace("_", " ")
            cause = (problem.get("message") or problem.text or "").strip().partition("\n")[0]
            yield f"{name}: {cause.removeprefix('AssertionError: ')}"


def read_table(text: str) -> dict[str, Served]:
    """The rows of the table of models, by family."""
    lines = (line.removesuffix("|").split("|", 4) for line in text.splitlines() if line[:1] == "|")
    rows = ([cell.strip() for cell in line[1:]] for line in lines)
    return {family: Served(*facts) for family, *facts in rows if facts[0] in WAYS}


def differences(
    before: Mapping[str, Served], now: Mapping[str, Served]
) -> Iterator[tuple[bool, str]]:
    """What moved in the table, each a sentence and whether it is for the worse."""
    for family in sorted(before.keys() | now.keys(), key=str.lower):
        old, new = before.get(family), now.get(family)
        if new is None:
            yield True, f"{family} is gone"
        elif old is None:
            yield False, f"{family} is new: {new.way}{_because(new)}"
        elif old.way != new.way:
            is_worse = new.rank > old.rank
            yield is_worse, f"{family} was {old.way} and is {new.way} now{_because(new)}"
        elif old.keeps != new.keeps:
            yield False, f"{family} kept {old.keeps} and keeps {new.keeps} now"


def _because(served: Served) -> str:
    return f", because {served.reason}" if served.reason else ""


def run_tests(python: Path) -> list[str]:
    """A sentence for each test that failed."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [str(python), "-m", "pytest", "-p", "no:cacheprovider", f"--junitxml={report}"]
        subprocess.run([*command, "--tb=no", *TESTS], cwd=ROOT, check=False)
        return list(failures(report.read_text()))


def make_table(python: Path) -> dict[str, Served]:
    command = [str(python), "-m", "tests.contract.models_table"]
    made = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
    return read_table(made.stdout)


def check(python: Path) -> bool:
    """Whether nothing is worse; prints what moved."""
    asked = [str(python), "-c", VERSIONS, *PACKAGES]
    found = subprocess.run(asked, check=True, stdout=subprocess.PIPE, text=True).stdout.split()
    failed = run_tests(python)
    moved = list(differences(read_table(TABLE.read_text()), make_table(python)))
    print("\nWith", ", ".join(map(" ".join, zip(PACKAGES, found, strict=True))))
    print(f"{len(failed)} tests failed", *failed, sep="\n- ")
    print(f"{len(moved)} families moved", *(sentence for _, sentence in moved), sep="\n- ")
    return not failed and not any(is_worse for is_worse, _ in moved)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--backend", default="cpu", help="of mlx on Linux")
    parser.add_argument("--python", type=Path, help="of an environment to use as it is")
    given = parser.parse_args()
    if given.python is not None:
        return 0 if check(given.python) else 1
    with tempfile.TemporaryDirectory() as folder:
        return 0 if check(newest_environment(Path(folder), given.backend)) else 1


if __name__ == "__main__":
    sys.exit(main())
