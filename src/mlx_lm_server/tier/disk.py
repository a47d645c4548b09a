"""The io side of the tier: does jobs and keeps the folder in order. One thread owns it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress

from mlx_lm_server.tier.clock import Clock
from mlx_lm_server.tier.files import Files
from mlx_lm_server.tier.jobs import (
    Emit,
    FlushJob,
    LoadJob,
    Read,
    Saved,
    SaveJob,
    SaveOutcome,
    UseJob,
)
from mlx_lm_server.tier.layout import Namespace
from mlx_lm_server.tier.reader import RecordReader
from mlx_lm_server.tier.records import Record
from mlx_lm_server.tier.settings import TierSettings
from mlx_lm_server.tier.shelf import Shelf
from mlx_lm_server.tier.sweep import Sweep
from mlx_lm_server.tier.writer import RecordWriter
from mlx_lm_server.tier_stats import TierCounters

SWEEP_AGAIN_S = 300.0


class DiskTier:
    """Does jobs and tells of them through `emit`. It raises no error of the disk's."""

    def __init__(
        self,
        settings: TierSettings,
        namespace: Namespace,
        files: Files,
        clock: Clock,
        emit: Emit,
        wait: Callable[[float], None],
    ) -> None:
        self._shelf = Shelf(settings, namespace, files, clock, emit)
        self._writer = RecordWriter(self._shelf, wait)
        self._reader = RecordReader(self._shelf)
        self._sweep: Sweep | None = None
        self._next_sweep_s = 0.0
        self._next_turn_s = 0.0

    @property
    def counters(self) -> TierCounters:
        return self._shelf.counters

    @property
    def used_bytes(self) -> int:
        return self._shelf.index.used_bytes

    @property
    def limit_bytes(self) -> int:
        return self._shelf.quota.limit_bytes

    def open(self) -> None:
        self._shelf.open()

    def save(self, job: SaveJob) -> None:
        self._writer.save(job)
        self.turn_if_due()

    def give_up(self, job: SaveJob, outcome: SaveOutcome) -> None:
        """Ends a save that is not tried, or in which something unforeseen was raised."""
        match outcome:
            case SaveOutcome.CANCELLED:
                self.counters.saves_cancelled += 1
            case SaveOutcome.UNFIT:
                self.counters.saves_unfit += 1
                self.counters.write_drops += 1
            case _:
                self.counters.save_errors += 1
        self._shelf.emit(Saved(job, outcome))

    def load(self, job: LoadJob) -> Iterator[None]:
        """Reads a record a step, until something is missing or nobody wants it any more."""
        records: list[Record] = []
        read_s = 0.0
        try:
            self._reader.begin(job)
            for wanted in job.wanted:
                started_s = self._shelf.clock.monotonic_s()
                record = None if job.is_cancelled else self._reader.read(job, wanted)
                read_s += self._shelf.clock.monotonic_s() - started_s
                if record is None:
                    break
                records.append(record)
                yield
        finally:
            self._reader.end()
        self.give_back(job, tuple(records), read_s)

    def give_back(self, job: LoadJob, records: tuple[Record, ...], read_s: float) -> None:
        self._shelf.emit(Read(job, records, read_s))

    def use(self, job: UseJob) -> None:
        for name in job.names:
            self._shelf.index.use(name, self._shelf.ticks.now())

    def flush(self, job: FlushJob) -> None:
        self._writer.sync_folders()
        self._shelf.commit()
        job.done.set()

    def turn_if_due(self) -> None:
        """Does what is due once in a flush interval, however busy the tier is."""
        now_s = self._shelf.clock.monotonic_s()
        if now_s < self._next_turn_s:
            return
        self._next_turn_s = now_s + self._shelf.settings.flags.ssd_flush_interval_s
        self._shelf.keep_open()
        self._writer.sync_folders()
        self._shelf.commit()
        self._shelf.keep_within_limits()

    def tidy(self) -> bool:
        """Does a small step of a sweep, of which there is one after each opening of the index and
        others where index and files were found to disagree; returns whether there is more to do."""
        now_s = self._shelf.clock.monotonic_s()
        is_due = self._shelf.is_in_doubt and self._sweep is None and now_s >= self._next_sweep_s
        if self._shelf.is_new or is_due:
            self._next_sweep_s = now_s + SWEEP_AGAIN_S
            self._shelf.is_new = self._shelf.is_in_doubt = False
            self._sweep = Sweep(self._shelf)
        if self._sweep is not None and not self._sweep.step():
            self._sweep = None
            self._shelf.commit()
        return self._sweep is not None

    def close(self) -> None:
        with suppress(OSError):
            self._writer.sync_folders()
        self._shelf.close()
