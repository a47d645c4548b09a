"""What an engine wrote about its steps can be read when it is gone."""

from __future__ import annotations

import os
import subprocess
import sys

from mlx_lm_server.step_note import SLOT_BYTES, StepNote, open_note

WRITES_AND_DIES = """
import os, signal, sys
from mlx_lm_server.step_note import StepNote
note = StepNote(int(sys.argv[1]))
note.tell(["a", "b"])
note.tell(["b", "c"])
note.tell(["c", "d"])
os.kill(os.getpid(), signal.SIGKILL)
"""


def both_ends() -> tuple[StepNote, StepNote]:
    fd = open_note()
    return StepNote(os.dup(fd)), StepNote(fd)


def test_the_last_two_steps_are_read_when_the_writer_was_killed() -> None:
    fd = open_note()
    reader = StepNote(os.dup(fd))
    subprocess.run([sys.executable, "-c", WRITES_AND_DIES, str(fd)], pass_fds=[fd], check=False)
    os.close(fd)
    assert reader.read() == {"b", "c", "d"}


def test_nothing_is_under_way_before_the_first_step_and_after_the_last() -> None:
    writer, reader = both_ends()
    assert reader.read() == set()
    writer.tell(["a"])
    writer.clear()
    assert reader.read() == set()
    writer.tell(["b"])
    assert reader.read() == {"b"}


def test_more_than_fits_is_not_known() -> None:
    writer, reader = both_ends()
    writer.tell(["x" * 1000] * (SLOT_BYTES // 1000))
    assert reader.read() is None
    writer.clear()
    assert reader.read() == set()
