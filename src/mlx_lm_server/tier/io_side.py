"""Where the io side runs: in a thread of its own, or in the engine's thread, step by step."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Iterator
from typing import Protocol

from mlx_lm_server.tier.background import never_interrupt
from mlx_lm_server.tier.disk import DiskTier
from mlx_lm_server.tier.jobs import FlushJob, Job, LoadJob, SaveJob, SaveOutcome, UseJob
from mlx_lm_server.tier.mailbox import Mailbox
from mlx_lm_server.tier.settings import TierSettings

log = logging.getLogger(__name__)

LONGEST_NAP_S = 0.5
MakeDisk = Callable[[Callable[[float], None]], DiskTier]


class IoSide(Protocol):
    """What `SsdStore` needs of either; called by the engine's thread."""

    disk: DiskTier

    def has_room(self, nbytes: int) -> bool:
        """Returns whether a save of that size should be given now; see Mailbox."""

    def keep_late(self) -> None:
        """Lets no save be dropped any more because it waits long."""

    def put(self, job: Job) -> None: ...

    def take_cancelled(self) -> list[SaveJob]:
        """Takes out the cancelled saves that were not begun."""

    def work(self) -> None:
        """Does what is left to the step loop itself."""

    @property
    def num_saves(self) -> int:
        """Counts the saves that are not done."""

    @property
    def save_bytes(self) -> int: ...

    def close(self, timeout_s: float) -> list[SaveJob]:
        """Writes what waits, commits and closes; returns the saves that were cancelled because time
        ran out."""


class IoThread:
    """A daemon thread that owns a DiskTier from its opening to its end; the engine's thread only
    reads its numbers."""

    def __init__(self, make_disk: MakeDisk, mailbox: Mailbox, settings: TierSettings) -> None:
        self._mailbox = mailbox
        self._nap_s = min(LONGEST_NAP_S, settings.flags.ssd_flush_interval_s)
        self.disk = make_disk(mailbox.sleep)
        self.has_room = mailbox.has_room
        self.keep_late = mailbox.keep_late
        self.put = mailbox.put
        self.take_cancelled = mailbox.take_cancelled
        self._thread = threading.Thread(target=self._run, name="tier-io", daemon=True)
        self._thread.start()

    @property
    def num_saves(self) -> int:
        return self._mailbox.num_saves

    @property
    def save_bytes(self) -> int:
        return self._mailbox.save_bytes

    def work(self) -> None:
        """Does nothing: the thread does it."""

    def close(self, timeout_s: float) -> list[SaveJob]:
        self._mailbox.close()
        self._thread.join(timeout_s)
        return self._mailbox.abandon() if self._thread.is_alive() else []

    def _run(self) -> None:
        never_interrupt()
        _guarded(self.disk.open)
        has_more = True
        while True:
            for late in self._mailbox.take_late():
                self.disk.give_up(late, SaveOutcome.UNFIT)
            job = self._mailbox.take(0.0 if has_more else self._nap_s)
            if job is not None:
                for _ in steps_of(self.disk, job):
                    pass
                self._mailbox.finish(job)
            elif self._mailbox.is_closing:
                break
            else:
                has_more = bool(_guarded(self.disk.tidy))
            _guarded(self.disk.turn_if_due)
        _guarded(self.disk.close)


class InlineIo:
    """Does everything in the caller's thread: saves at once, restores a few records in a step."""

    def __init__(self, make_disk: MakeDisk, settings: TierSettings) -> None:
        self._loads_per_step = settings.inline_loads_per_step
        self._reading: deque[Iterator[None]] = deque()
        self.disk = make_disk(lambda _seconds: None)
        _guarded(self.disk.open)

    num_saves = 0
    save_bytes = 0

    def has_room(self, nbytes: int) -> bool:
        return True

    def keep_late(self) -> None:
        """Does nothing, since no save waits."""

    def put(self, job: Job) -> None:
        if isinstance(job, LoadJob):
            self._reading.append(steps_of(self.disk, job))
            return
        for _ in steps_of(self.disk, job):
            pass

    def take_cancelled(self) -> list[SaveJob]:
        return []

    def work(self) -> None:
        for _ in range(self._loads_per_step):
            while self._reading and next(self._reading[0], self) is self:
                self._reading.popleft()
        if not self._reading:
            _guarded(self.disk.tidy)
        _guarded(self.disk.turn_if_due)

    def close(self, timeout_s: float) -> list[SaveJob]:
        self._reading.clear()
        _guarded(self.disk.close)
        return []


def steps_of(disk: DiskTier, job: Job) -> Iterator[None]:
    """Does a job, record by record. This is the border of the io side: no exception gets
    through."""
    try:
        match job:
            case SaveJob():
                disk.save(job)
            case LoadJob():
                yield from disk.load(job)
            case UseJob():
                disk.use(job)
            case FlushJob():
                disk.flush(job)
    except Exception:
        log.exception("the disk tier failed at a %s", type(job).__name__)
        _end_failed(disk, job)


def _end_failed(disk: DiskTier, job: Job) -> None:
    match job:
        case SaveJob():
            disk.give_up(job, SaveOutcome.FAILED)
        case LoadJob():
            disk.give_back(job, (), 0.0)
        case FlushJob():
            job.done.set()


def _guarded(task: Callable[[], object]) -> object:
    """Does what no job asked for, within the same border."""
    try:
        return task()
    except Exception:
        log.exception("the disk tier failed at its own work")
        return None
