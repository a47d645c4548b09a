"""The heap is there before it is needed, and free memory goes back when nothing is done."""

from __future__ import annotations

import subprocess
import sys

import pytest

from mlx_lm_server.runner.backends import host_memory
from mlx_lm_server.runner.backends.host_memory import IDLE_BEFORE_TRIM_S, HeapUpkeep
from tests.back_ends import needs_native

pytestmark = needs_native

# A process of its own, whose heap has no large holes that others left.
SCRIPT = """
import resource, sys, time
from pathlib import Path
from mlx_lm_server.runner.backends import blas
blas.preload(1)
import mlx.core as mx
from mlx_lm_server.runner.backends import host_memory
from mlx_lm_server.runner.backends.choose import choose

def resident_mb():
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() >> 20

host_memory.keep_freed_blocks()
upkeep = choose().upkeep(int(sys.argv[1]))
x = mx.random.normal((1 << 20,))
before = resident_mb()
match sys.argv[2]:
    case "rest":
        upkeep.rest()
    case "a step that took memory":
        upkeep.after_step(took_memory=True)
    case "some steps":
        for _ in range(host_memory.STEPS_BETWEEN_LOOKS):
            upkeep.after_step(took_memory=False)
found, least, ends_s = -1, int(sys.argv[3]), time.monotonic() + 60
while found != (found := resident_mb() - before) or found < least and time.monotonic() < ends_s:
    time.sleep(0.3)
assert mx.allclose(x + x, 2 * x), "what is touched stays as it was"
print(found)
"""


@pytest.mark.parametrize(
    ("when", "limit_gb", "most_mb"),
    [("rest", 64, 160), ("a step that took memory", 64, 160), ("some steps", 1, 32)],
)
def test_the_end_of_the_heap_is_found_before_anybody_writes_there(
    when: str, limit_gb: int, most_mb: int
) -> None:
    command = [sys.executable, "-c", SCRIPT, str(limit_gb << 30), when, str(int(0.6 * most_mb))]
    found_mb = int(subprocess.run(command, check=True, capture_output=True, timeout=120).stdout)
    assert 0.6 * most_mb < found_mb < 1.3 * most_mb


def test_after_a_while_without_work_free_memory_goes_back_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now_s, given_back = [0.0], []
    monkeypatch.setattr(host_memory, "give_back_freed_blocks", lambda: given_back.append(now_s[0]))
    upkeep = HeapUpkeep(1 << 30, None, clock=lambda: now_s[0])
    for now_s[0] in (1.0, 2.0, 2.5 + IDLE_BEFORE_TRIM_S, 100.0, 1000.0):
        upkeep.rest()
    assert given_back == [2.5 + IDLE_BEFORE_TRIM_S]
    upkeep.after_step(took_memory=False)
    for now_s[0] in (1001.0, 1002.0 + IDLE_BEFORE_TRIM_S):
        upkeep.rest()
    assert len(given_back) == 2
