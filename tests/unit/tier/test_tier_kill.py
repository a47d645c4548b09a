"""kill -9, for real: a process that saves is killed at each of its calls, then at random times."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tier_fakes import files_in, load, make_chain, open_store, remains_in, settled

HERE = Path(__file__).parent
SRC = HERE.parents[2] / "src"

# Runs without mlx and without threads, so that it may fork: each child is killed at one call.
AT_EACH_CALL = """
import os, signal, sys
from pathlib import Path
from tier_fakes import FaultFiles, make_chain, open_store, save_all

folder, calls = Path(sys.argv[1]), ("create", "write", "close", "rename", "unlink", "facts")

def run(target, kill_at):
    files, seen = FaultFiles(), [0]
    def count(*_args):
        seen[0] += 1
        if seen[0] == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
    for call in calls:
        files.before[call] = count
    store = open_store(target, files, async_writes=False, max_size_bytes=8000, flush_interval_s=0)
    save_all(store, make_chain(1, 8))
    store.close(1.0)
    return seen[0]

total = run(folder / "whole", -1)
for kill_at in range(1, total + 1):
    child = os.fork()
    if child == 0:
        run(folder / str(kill_at), kill_at)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL, kill_at
print(total)
"""

UNTIL_KILLED = """
import itertools, sys
from pathlib import Path
from tier_fakes import make_chain, open_store

store = open_store(Path(sys.argv[1]), flush_interval_s=0.02, durability=sys.argv[2])
print("ready", flush=True)
for n in itertools.count():
    for record in make_chain(n * 10, 5, nbytes=16_384):
        store.wait_for_room(record.nbytes, 5.0)
        store.save(record)
    store.poll()
"""


def python(script: str, *args: str) -> subprocess.Popen[str]:
    paths = os.pathsep.join([str(SRC), str(HERE)])
    return subprocess.Popen(
        [sys.executable, "-c", script, *args],
        env={**os.environ, "PYTHONPATH": paths},
        stdout=subprocess.PIPE,
        text=True,
    )


def test_a_kill_at_any_call_leaves_a_folder_that_works(tmp_path: Path) -> None:
    with python(AT_EACH_CALL, str(tmp_path)) as process:
        out, _ = process.communicate(timeout=100)
    assert process.returncode == 0
    total = int(out)
    assert total > 30
    chain = make_chain(1, 8)
    for kill_at in range(1, total + 1):
        folder = tmp_path / str(kill_at)
        assert len(remains_in(folder)) <= 1
        store = open_store(folder, async_writes=False)
        settled(store)
        for record in chain:
            load(store, [record])
        counters = store.stats().counters
        assert (counters.corrupt, counters.vanished) == (0, 0)
        assert counters.loads_hit == len(files_in(folder))
        store.close(1.0)


@pytest.mark.parametrize("durability", ["best_effort", "persistent"])
def test_a_kill_at_any_time_loses_no_finished_record(tmp_path: Path, durability: str) -> None:
    for delay_s in (0.0, 0.03, 0.11):
        with python(UNTIL_KILLED, str(tmp_path), durability) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            time.sleep(delay_s)
            process.send_signal(signal.SIGKILL)
        on_disk = len(files_in(tmp_path))
        store = open_store(tmp_path, async_writes=False, inline_loads_per_step=100)
        settled(store)
        assert store.stats().stored_records == on_disk
        found = 0
        for n in range(1 + on_disk // 5):
            found += sum(len(load(store, [r])) for r in make_chain(n * 10, 5, nbytes=16_384))
        assert found == on_disk
        assert store.stats().counters.corrupt == 0
        store.close(1.0)
