"""What the disk tier counts."""

from __future__ import annotations

from dataclasses import dataclass, fields


@dataclass(slots=True)
class Counters:
    """Events since the start. Each thread has its own; `plus` adds them for a reader.

    Each of `saves` ends in exactly one of `saves_persisted`, `saves_known` (another server was
    first), `saves_cancelled`, `saves_unfit` (no room within the evictions of one save, or waited
    too long behind a slow disk) and `save_errors`.
    `write_drops` are all that were not stored for want of room in the queue or on disk: those that
    were refused before their bytes were extracted, and `saves_unfit`.
    """

    saves: int = 0
    saves_persisted: int = 0
    saves_known: int = 0
    saves_cancelled: int = 0
    saves_unfit: int = 0
    save_errors: int = 0
    save_retries: int = 0
    write_drops: int = 0
    enospc: int = 0
    evictions: int = 0
    expired: int = 0
    loads: int = 0  # records asked for
    loads_hit: int = 0  # records read and verified
    corrupt: int = 0  # torn, flipped or foreign bytes
    mismatched: int = 0  # sound, but of other token ids or another name
    vanished: int = 0  # the index knew it, the folder did not
    load_errors: int = 0
    index_errors: int = 0
    index_rebuilds: int = 0
    files_adopted: int = 0  # found on disk without a row in the index
    files_removed: int = 0  # remains of a server that was killed, and what is no record
    bytes_written: int = 0
    bytes_read: int = 0

    def plus(self, other: Counters) -> Counters:
        names = [each.name for each in fields(Counters)]
        return Counters(**{name: getattr(self, name) + getattr(other, name) for name in names})
