"""Processes that end with the benchmark that started them, however it ends.

A benchmark that is killed can end nothing any more. So a small process in a session of its own
reads the ids of what was started from a pipe, and when the pipe closes it kills those that are
left and all below them. It works for servers that know nothing of it, and leaves no process
between the benchmark and what it measures.
"""

from __future__ import annotations

import contextlib
import functools
import subprocess
import sys
from typing import Any

import psutil


def start(command: list[str], **options: Any) -> subprocess.Popen[bytes]:
    """`subprocess.Popen` of a process that does not outlive this one."""
    pipe = _watcher().stdin
    assert pipe is not None
    child = subprocess.Popen(command, **options)
    pipe.write(b"%d\n" % child.pid)
    pipe.flush()
    return child


@functools.cache
def _watcher() -> subprocess.Popen[bytes]:
    """One for this process, found to be there before anything is started."""
    watcher = subprocess.Popen(
        [sys.executable, __file__],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,  # Ctrl-C reaches the benchmark, not this one
    )
    assert watcher.stdout is not None
    if not watcher.stdout.readline():
        raise RuntimeError(f"the reaper ended with {watcher.wait()}")
    return watcher


def main() -> None:
    print("watching", flush=True)
    started = []
    for line in sys.stdin:
        with contextlib.suppress(psutil.NoSuchProcess):
            started.append(psutil.Process(int(line)))
    for process in started:
        for member in _family(process):
            # psutil knows a process by its start too: an id that is used again is left alone.
            with contextlib.suppress(psutil.NoSuchProcess):
                member.kill()


def _family(process: psutil.Process) -> list[psutil.Process]:
    with contextlib.suppress(psutil.NoSuchProcess):
        return [*process.children(recursive=True), process]
    return []


if __name__ == "__main__":
    main()
