"""What the engine's thread asks of the io side, and what the io side tells it.

The engine's thread makes jobs and sets `is_cancelled`, which the io side only reads. Events go the
other way, through a deque, and the io side touches none that it has sent.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum, auto
from threading import Event as Signal

from mlx_lm_server.tier.records import Record, Ticket, Wanted


class SaveOutcome(Enum):
    PERSISTED = auto()
    KNOWN = auto()  # it was there already, perhaps from another server
    CANCELLED = auto()
    UNFIT = auto()  # no room on disk, no index to put it in, or too late
    FAILED = auto()

    @property
    def is_stored(self) -> bool:
        return self in (SaveOutcome.PERSISTED, SaveOutcome.KNOWN)


@dataclass(slots=True, eq=False)
class SaveJob:
    """A record to write; one that came to a full queue may be dropped from `give_up_at_s` on."""

    record: Record
    owner: str
    nbytes: int
    give_up_at_s: float = math.inf
    is_cancelled: bool = False


@dataclass(slots=True, eq=False)
class LoadJob:
    """Records to read; those `at_hand` were not written yet when they were asked for."""

    ticket: Ticket
    wanted: tuple[Wanted, ...]
    at_hand: Mapping[bytes, Record]
    nbytes: int
    is_cancelled: bool = False


@dataclass(slots=True, eq=False)
class UseJob:
    """Records that were used from memory."""

    names: tuple[bytes, ...]


@dataclass(slots=True, eq=False)
class FlushJob:
    """A wish to have all before it on disk; `done` is set when that is so, or given up."""

    done: Signal = field(default_factory=Signal)


Job = SaveJob | LoadJob | UseJob | FlushJob


@dataclass(frozen=True, slots=True)
class Saved:
    """The end of a save; `size` is the file's, 0 where there is none."""

    job: SaveJob
    outcome: SaveOutcome
    size: int = 0


@dataclass(frozen=True, slots=True)
class Read:
    """The end of a read, with the records up to the first that was absent."""

    job: LoadJob
    records: tuple[Record, ...]
    read_s: float


@dataclass(frozen=True, slots=True)
class Found:
    """Records that are on disk, with their files' sizes. The dict is the receiver's from now on."""

    sizes: dict[bytes, int]


@dataclass(frozen=True, slots=True)
class Gone:
    """Records that are not on disk any more."""

    names: tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class Paused:
    """The disk takes nothing; do not try before `until_s` of the monotonic clock."""

    until_s: float


Event = Saved | Read | Found | Gone | Paused
Emit = Callable[[Event], None]
