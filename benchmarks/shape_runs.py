"""Processes that count the steps of one contender each."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import msgspec

from benchmarks import reaper
from benchmarks.shape_child import Load, Shape, Task


def measured(names: Sequence[str], task: Task) -> dict[str, list[Shape]]:
    """Runs one contender after the other, so that none disturbs another's time."""
    with models(task.layers) as folder:
        return {name: shapes_of(started(name, folder, task)) for name in names}


def counted_at_once(tasks: Mapping[str, Task]) -> dict[str, list[Shape]]:
    """Runs all contenders at once: what they are sent is counted, not how long that takes."""
    layers = {each for task in tasks.values() for each in task.layers}
    with models(sorted(layers)) as folder:
        children = {name: started(name, folder, task) for name, task in tasks.items()}
        return {name: shapes_of(child) for name, child in children.items()}


@contextmanager
def models(layers: Sequence[int]) -> Iterator[str]:
    """Yields a folder with the models of so many layers; written by another process, since this
    one may serve models."""
    with tempfile.TemporaryDirectory() as folder:
        printed_by(child_of("benchmarks.shape_models", folder, *map(str, layers)))
        yield folder


def started(name: str, folder: str, task: Task) -> subprocess.Popen[bytes]:
    return child_of("benchmarks.shape_child", name, folder, msgspec.json.encode(task).decode())


def child_of(module: str, *given: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", module, *given]
    return reaper.start(command, stdout=subprocess.PIPE)


def shapes_of(child: subprocess.Popen[bytes]) -> list[Shape]:
    return msgspec.json.decode(printed_by(child), type=list[Shape])


def printed_by(child: subprocess.Popen[bytes]) -> bytes:
    """Returns the last line that a child prints. Raises CalledProcessError where it fails."""
    printed, _ = child.communicate()
    if child.returncode:
        raise subprocess.CalledProcessError(child.returncode, child.args)
    return printed.splitlines()[-1]


def title_of(load: Load) -> str:
    rows = f"{load.num_rows} row{'s' * (load.num_rows > 1)}"
    lengths = " of different lengths" * load.is_ragged
    drawn = f", {load.sampling}" * (load.sampling != "greedy")
    happens = f", one {load.event}" if load.event else ""
    return f"{rows}{lengths}{' and a chunk' * load.has_chunk}{drawn}{happens}"
