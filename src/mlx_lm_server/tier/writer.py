"""Writes one record: room, temporary file, rename; with retries, and a pause when nothing helps.

Owned by the io side. A cancelled save leaves no file: the mark is looked at before the rename and
once more after it.
"""

from __future__ import annotations

import errno
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from mlx_lm_server.tier import codec
from mlx_lm_server.tier.codec import EncodedRecord
from mlx_lm_server.tier.entries import Entry
from mlx_lm_server.tier.files import write_file
from mlx_lm_server.tier.jobs import Paused, Saved, SaveJob, SaveOutcome
from mlx_lm_server.tier.records import Record
from mlx_lm_server.tier.shelf import Shelf

log = logging.getLogger(__name__)

DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
FIRST_RETRY_S = 0.05
FAILURES_TO_PAUSE = 3
LONGEST_PAUSE_S = 60.0
LOG_AGAIN_S = 10.0


@dataclass(slots=True)
class _Unsynced:
    """Saves whose files are on the medium but whose folder's entries may not be."""

    saves: int = 0
    failures: int = 0


class RecordWriter:
    """Owned by the io side. `wait` sleeps between retries, as long as nobody stops it."""

    def __init__(self, shelf: Shelf, wait: Callable[[float], None]) -> None:
        self._shelf = shelf
        self._files = shelf.files
        self._wait = wait
        self._is_persistent = shelf.settings.flags.is_persistent
        self._failures_in_a_row = 0
        self._unsynced: dict[Path, _Unsynced] = {}
        self._log_again_at_s = 0.0
        self._unlogged = 0

    def save(self, job: SaveJob) -> None:
        """Writes the job's record, whatever comes; the outcome is counted and told."""
        outcome = self._save(job)
        match outcome:
            case SaveOutcome.PERSISTED:
                self._failures_in_a_row = 0
            case SaveOutcome.KNOWN:
                self._shelf.counters.saves_known += 1
            case SaveOutcome.CANCELLED:
                self._shelf.counters.saves_cancelled += 1
            case SaveOutcome.UNFIT:
                self._shelf.counters.saves_unfit += 1
                self._shelf.counters.write_drops += 1
            case SaveOutcome.FAILED:
                self._shelf.counters.save_errors += 1
        entry = self._shelf.index.get(job.record.name) if outcome.is_stored else None
        self._shelf.emit(Saved(job, outcome, entry.size if entry else 0))

    def sync_folders(self) -> None:
        """Brings folders onto the medium; with `persistent` a save counts as such only then."""
        for folder, unsynced in list(self._unsynced.items()):
            try:
                self._files.sync_folder(folder)
            except OSError as error:
                unsynced.failures += 1
                if unsynced.failures <= self._shelf.settings.flags.ssd_persistent_max_retries:
                    self._shelf.counters.save_retries += 1
                    continue
                self._shelf.counters.save_errors += unsynced.saves
                self._log_failure(f"folder {folder.name}", error)
            else:
                self._shelf.counters.saves_persisted += unsynced.saves
            del self._unsynced[folder]

    def _save(self, job: SaveJob) -> SaveOutcome:
        shelf, record = self._shelf, job.record
        if job.is_cancelled:
            return SaveOutcome.CANCELLED
        if shelf.index.get(record.name) is not None:
            return SaveOutcome.KNOWN
        encoded = codec.encode(record)
        if not shelf.index.is_open or not shelf.make_room(encoded.nbytes):
            return SaveOutcome.UNFIT
        try:
            is_written = self._write_with_retries(job, encoded)
        except OSError as error:
            self._note_failure(record.name.hex(), error)
            return SaveOutcome.FAILED
        if not is_written:
            return SaveOutcome.CANCELLED
        self._note_written(record, encoded)
        return SaveOutcome.PERSISTED

    def _write_with_retries(self, job: SaveJob, encoded: EncodedRecord) -> bool:
        """Returns False where the save was cancelled. Raises OSError when all tries are used up."""
        shelf = self._shelf
        tries_left = shelf.settings.flags.ssd_persistent_max_retries if self._is_persistent else 0
        may_make_room = may_make_folders = True
        wait_s = FIRST_RETRY_S
        while True:
            try:
                return self._write(job, encoded)
            except OSError as error:
                if isinstance(error, FileNotFoundError) and may_make_folders:
                    may_make_folders = False
                    shelf.make_folders()
                elif error.errno in DISK_FULL and self._count_full() and may_make_room:
                    may_make_room = False
                    shelf.quota.measure(shelf.index.used_bytes)
                    if not shelf.make_room(encoded.nbytes):
                        raise
                elif tries_left and not job.is_cancelled:
                    tries_left -= 1
                    shelf.counters.save_retries += 1
                    self._wait(wait_s)
                    wait_s *= 2
                else:
                    raise

    def _write(self, job: SaveJob, encoded: EncodedRecord) -> bool:
        temporary = self._shelf.layout.temporary(self._shelf.namespace)
        target = self._shelf.path(job.record.name)
        try:
            write_file(self._files, temporary, encoded.pieces, durably=self._is_persistent)
            if not job.is_cancelled:
                self._files.rename(temporary, target)
        except OSError:
            self._shelf.remove_quietly(temporary)
            raise
        if job.is_cancelled:  # before the rename or while it went on
            self._shelf.remove_quietly(temporary)
            self._shelf.remove_quietly(target)
        return not job.is_cancelled

    def _note_written(self, record: Record, encoded: EncodedRecord) -> None:
        shelf, tick = self._shelf, self._shelf.ticks.now()
        shelf.index.add(
            shelf.namespace,
            Entry(
                name=record.name,
                parent=record.parent,
                kind=record.kind,
                num_tokens=record.num_tokens,
                size=encoded.nbytes,
                checksum=encoded.checksum,
                last_use=tick,
            ),
        )
        shelf.index.use(record.parent, tick)
        shelf.counters.bytes_written += encoded.nbytes
        if self._is_persistent:
            folder = shelf.path(record.name).parent
            self._unsynced.setdefault(folder, _Unsynced()).saves += 1
        else:
            shelf.counters.saves_persisted += 1

    def _count_full(self) -> bool:
        self._shelf.counters.enospc += 1
        return True

    def _note_failure(self, what: str, error: OSError) -> None:
        self._log_failure(what, error)
        self._failures_in_a_row += 1
        over = self._failures_in_a_row - FAILURES_TO_PAUSE
        if over >= 0 or error.errno in DISK_FULL:
            pause_s = min(LONGEST_PAUSE_S, 2.0 ** max(0, over))
            self._shelf.emit(Paused(self._shelf.clock.monotonic_s() + pause_s))

    def _log_failure(self, what: str, error: OSError) -> None:
        """Logs one line, and counts what follows at once in the next line."""
        now_s = self._shelf.clock.monotonic_s()
        if now_s < self._log_again_at_s:
            self._unlogged += 1
            return
        more = f" ({self._unlogged} more since the last such line)" if self._unlogged else ""
        log.error("the disk tier could not write %s: %s%s", what, error, more)
        self._log_again_at_s, self._unlogged = now_s + LOG_AGAIN_S, 0
