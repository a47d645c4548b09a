"""Nobody calls most benchmarks between two releases."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[3]
PROGRAM = """
import importlib, sys
for name in sys.argv[1:]:
    importlib.import_module(name)
"""


def test_what_benchmarks_take_from_the_server_is_there() -> None:
    files = sorted((ROOT / "benchmarks").rglob("*.py"))
    modules = [".".join(f.relative_to(ROOT).with_suffix("").parts) for f in files]
    importable = [name for name in modules if not name.endswith("__")]
    assert "benchmarks.contenders.bare" in importable
    command = [sys.executable, "-c", PROGRAM, *importable]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
