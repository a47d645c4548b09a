"""What the engine's thread asks of the io side, and what the io side tells it.

The engine's thread makes jobs and sets `is_cancelled`; the io side only reads it. Events go the
other way, through a deque, and are never changed.
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
    KNOWN = auto()  # it was there already
    CANCELLED = auto()
    UNFIT = auto()  # no room on disk, or too late
    FAILED = auto()

    @property
    def is_stored(self) -> bool:
        return self in (SaveOutcome.PERSISTED, SaveOutcome.KNOWN)


@dataclass(slots=True, eq=False)
class SaveJob:
    """`give_up_at_s`: when a record that came to a full queue is dropped."""

    record: Record
    owner: str
    nbytes: int
    give_up_at_s: float = math.inf
    is_cancelled: bool = False


@dataclass(slots=True, eq=False)
class LoadJob:
    """`at_hand` are wanted records that wait to be written."""

    ticket: Ticket
    wanted: tuple[Wanted, ...]
    at_hand: Mapping[bytes, Record]
    nbytes: int
    is_cancelled: bool = False


@dataclass(slots=True, eq=False)
class UseJob:
    names: tuple[bytes, ...]


@dataclass(slots=True, eq=False)
class FlushJob:
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
    job: LoadJob
    records: tuple[Record, ...]
    read_s: float


@dataclass(frozen=True, slots=True)
class Found:
    """Records that are on disk, with their files' sizes. The dict is the receiver's from now on."""

    sizes: dict[bytes, int]


@dataclass(frozen=True, slots=True)
class Gone:
    names: tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class Paused:
    """The disk takes nothing; do not try before `until_s` of the monotonic clock."""

    until_s: float


Event = Saved | Read | Found | Gone | Paused
Emit = Callable[[Event], None]
