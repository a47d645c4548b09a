"""A benchmark that is killed leaves nothing computing."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).parents[3]
# A benchmark whose child has a child of its own and ignores what asks it to end.
CHILD = """
import signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
signal.signal(signal.SIGINT, signal.SIG_IGN)
below = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print(below.pid, flush=True)
time.sleep(600)
"""
# A shell that starts the tests in the background lets them, and so the benchmark, ignore SIGINT.
BENCHMARK = """
import signal, subprocess, sys, time
from benchmarks import reaper
signal.signal(signal.SIGINT, signal.default_int_handler)
child = reaper.start([sys.executable, "-c", sys.argv[1]], stdout=subprocess.PIPE)
print(child.pid, int(child.stdout.readline()), flush=True)
time.sleep(float(sys.argv[2]))
"""


def start_benchmark(duration_s: float) -> tuple[subprocess.Popen[bytes], list[psutil.Process]]:
    benchmark = subprocess.Popen(
        [sys.executable, "-c", BENCHMARK, CHILD, str(duration_s)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    assert benchmark.stdout is not None
    pids = [int(word) for word in benchmark.stdout.readline().split()]
    return benchmark, [psutil.Process(pid) for pid in pids]


@pytest.mark.parametrize("signal_number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_killed_benchmark_takes_everything_below_it_along(signal_number: int) -> None:
    benchmark, family = start_benchmark(600)
    watcher = [p for p in psutil.Process(benchmark.pid).children() if p not in family]
    assert len(family) == 2
    assert len(watcher) == 1
    benchmark.send_signal(signal_number)
    benchmark.wait(10)
    _, alive = psutil.wait_procs([*family, *watcher], timeout=10)
    assert alive == []


def test_a_benchmark_that_ends_by_itself_leaves_nothing_either() -> None:
    benchmark, family = start_benchmark(0)
    assert benchmark.wait(10) == 0
    _, alive = psutil.wait_procs(family, timeout=10)
    assert alive == []
