"""A note of the requests whose steps are under way, which outlives the engine that writes it.

The engine writes before it submits a step, the server reads when the engine is dead. Both map the
same file without a name, so that writing is copying a few bytes and no call of the system. A step
is submitted while the one before runs, so there are two slots, used in turn:

    size of the ids, or 0, or UNKNOWN · the ids, one a line
"""

from __future__ import annotations

import mmap
import os
import struct
import tempfile
from collections.abc import Sequence

SLOT_BYTES = 1 << 18  # some 5000 requests
NUM_SLOTS = 2
SIZE = struct.Struct("<I")
UNKNOWN = 0xFFFFFFFF  # the ids do not fit, or are being written


def open_note() -> int:
    """Returns a descriptor of an empty note. Raises OSError."""
    if hasattr(os, "memfd_create"):
        fd = os.memfd_create("step-note")
    else:
        with tempfile.TemporaryFile() as file:
            fd = os.dup(file.fileno())
    os.ftruncate(fd, NUM_SLOTS * SLOT_BYTES)
    return fd


class StepNote:
    """One end of a note, the engine's or the server's. Closes the descriptor that it is made of."""

    def __init__(self, fd: int) -> None:
        self._bytes = mmap.mmap(fd, NUM_SLOTS * SLOT_BYTES)
        os.close(fd)
        self._told: list[Sequence[str]] = [()] * NUM_SLOTS
        self._slot = 0

    def tell(self, req_ids: Sequence[str]) -> None:
        """Writes down whose step is submitted next, in place of the last but one."""
        self._slot = slot = 1 - self._slot
        if req_ids != self._told[slot]:
            self._write(slot, req_ids)

    def clear(self) -> None:
        """Writes down that no step is under way."""
        for slot in range(NUM_SLOTS):
            if self._told[slot]:
                self._write(slot, ())

    def _write(self, slot: int, req_ids: Sequence[str]) -> None:
        self._told[slot] = req_ids
        start = slot * SLOT_BYTES
        text = "\n".join(req_ids).encode()
        SIZE.pack_into(self._bytes, start, UNKNOWN)
        if len(text) <= SLOT_BYTES - SIZE.size:
            self._bytes[start + SIZE.size : start + SIZE.size + len(text)] = text
            SIZE.pack_into(self._bytes, start, len(text))

    def read(self) -> set[str] | None:
        """Returns whose steps are under way; None where that was not written down."""
        found: set[str] = set()
        for start in range(0, NUM_SLOTS * SLOT_BYTES, SLOT_BYTES):
            [size] = SIZE.unpack_from(self._bytes, start)
            if size > SLOT_BYTES - SIZE.size:
                return None
            text = self._bytes[start + SIZE.size : start + SIZE.size + size]
            found.update(text.decode(errors="replace").split("\n") if text else ())
        return found

    def close(self) -> None:
        self._bytes.close()
