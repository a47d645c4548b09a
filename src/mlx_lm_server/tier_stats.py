"""What the disk tier counts and measures: each number stands here once, with its words.

The tier counts in `TierCounters` and tells the server in `TierStats`, which travels whole.
`shown` derives from their fields what /metrics and /health say.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from operator import add
from typing import Annotated, get_type_hints

import msgspec


@dataclass(frozen=True, slots=True)
class About:
    """What a number says, in the words of /metrics. A number `within` another is shown as a part of
    that one, and one that `is_inner` only to who looks into the process."""

    help: str
    within: str = ""
    is_inner: bool = False


class TierCounters(msgspec.Struct, array_like=True):
    """Events since the start. Whoever counts, on whatever thread, has its own; `plus` adds them
    for a reader.

    Each of `saves` ends in exactly one of `saves_persisted`, `saves_known`, `saves_cancelled`,
    `saves_unfit` and `save_errors`, unless the store was closed before it could.
    `write_drops` are all that were not stored for want of room or time: those that were refused
    before their bytes were extracted, `saves_unfit`, and those that were left at the closing.
    """

    saves: Annotated[int, About("Records given to the disk tier.")] = 0
    saves_persisted: Annotated[int, About("Of them, written.")] = 0
    saves_known: Annotated[int, About("Of them, there already.", is_inner=True)] = 0
    saves_cancelled: Annotated[int, About("Of them, cancelled.", is_inner=True)] = 0
    saves_unfit: Annotated[
        int, About("Of them, without room on disk or a turn in time.", is_inner=True)
    ] = 0
    write_drops: Annotated[int, About("Not stored for want of room in the queue or on disk.")] = 0
    save_errors: Annotated[int, About("Writes that failed.")] = 0
    save_retries: Annotated[int, About("Writes tried again.")] = 0
    enospc: Annotated[int, About("Writes that found the disk full.")] = 0
    evictions: Annotated[int, About("Records removed to stay within the limit.")] = 0
    expired: Annotated[int, About("Records removed for their age.")] = 0
    loads: Annotated[int, About("Records asked for.")] = 0
    loads_hit: Annotated[int, About("Of them, read and verified.")] = 0
    corrupt: Annotated[int, About("Files that were not what they should be.")] = 0
    mismatched: Annotated[
        int, About("Sound files, but of other token ids or another name.", within="corrupt")
    ] = 0
    load_errors: Annotated[int, About("Reads that failed.")] = 0
    vanished: Annotated[
        int, About("Files that the index knew and the folder did not.", within="load_errors")
    ] = 0
    bytes_written: Annotated[int, About("Bytes written.")] = 0
    bytes_read: Annotated[int, About("Bytes read.")] = 0
    restored_tokens: Annotated[int, About("Tokens of blocks that came back from disk.")] = 0
    index_errors: Annotated[int, About("Times that sqlite could not do it.", is_inner=True)] = 0
    index_rebuilds: Annotated[int, About("Indexes that were corrupt.", is_inner=True)] = 0
    files_adopted: Annotated[int, About("Files found without a row.", is_inner=True)] = 0
    files_removed: Annotated[
        int, About("What killed servers left, and what is no record.", is_inner=True)
    ] = 0

    def plus(self, other: TierCounters) -> TierCounters:
        """Returns the sums, number by number."""
        ours, theirs = msgspec.structs.astuple(self), msgspec.structs.astuple(other)
        return TierCounters(*map(add, ours, theirs))


class TierStats(msgspec.Struct, frozen=True, array_like=True):
    """How the disk tier is now, and `counters` of all that has happened since the start."""

    counters: TierCounters = msgspec.field(default_factory=TierCounters)
    stored_records: Annotated[int, About("Records of this model on disk.")] = 0
    used_bytes: Annotated[int, About("Bytes on disk, of all models.")] = 0
    limit_bytes: Annotated[int, About("Most bytes that may be on disk.")] = 0
    pending_saves: Annotated[int, About("Records that wait for the writer.")] = 0
    pending_bytes: Annotated[int, About("Their bytes.", is_inner=True)] = 0
    pending_reads: Annotated[int, About("Reads that have not ended.", is_inner=True)] = 0
    is_paused: Annotated[bool, About("1 while writes fail and none is tried.")] = False
    is_open: Annotated[bool, About("1 once the folder could be read.")] = False
    read_bytes_per_s: Annotated[float, About("How fast reads were.", is_inner=True)] = 0.0


@dataclass(frozen=True, slots=True)
class Shown:
    """A number as users see it; `is_total` says that it counts from the engine's start."""

    name: str
    help: str
    value: float
    is_total: bool


def shown(stats: TierStats) -> Iterator[Shown]:
    """Yields what users see of the numbers: totals first, in the order of the fields."""
    for numbers in (stats.counters, stats):
        words = WORDS[type(numbers)]
        for name, about in words.items():
            if about.within or about.is_inner:
                continue
            value = getattr(numbers, name)
            for part, other in words.items():
                if other.within == name:
                    value += getattr(numbers, part)
            yield Shown(name, about.help, value, is_total=numbers is stats.counters)


def _words_of(kind: type[msgspec.Struct]) -> dict[str, About]:
    """Returns what is said of each field that anything is said of."""
    return {
        name: mark
        for name, hint in get_type_hints(kind, include_extras=True).items()
        for mark in getattr(hint, "__metadata__", ())
        if isinstance(mark, About)
    }


WORDS = {kind: _words_of(kind) for kind in (TierCounters, TierStats)}
