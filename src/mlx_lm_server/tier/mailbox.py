"""The queue of jobs from the engine's thread to the io thread, and the lock between them."""

from __future__ import annotations

from collections import deque
from threading import Condition

from mlx_lm_server.tier.clock import Clock
from mlx_lm_server.tier.jobs import FlushJob, Job, LoadJob, SaveJob, UseJob
from mlx_lm_server.tier.settings import TierSettings

# How far over its size the queue takes records, which then wait for a bounded time only.
BACKLOG_SHARE = 8


class Mailbox:
    """Hands out restores and notes of use first, since a request waits for the former; saves and
    flushes keep their order.

    It takes whatever it is given: who saves asks `has_room` before. The number that it bounds is of
    the jobs that wait, the bytes are also those of the save that is being written. A short backlog
    is ridden over: there is room for some records beyond the size, and `take_late` gives up those
    whose turn does not come soon.
    """

    def __init__(self, settings: TierSettings, clock: Clock) -> None:
        self._size = settings.flags.ssd_writer_queue_size
        self._max_bytes = settings.max_pending_bytes
        self._backlog_wait_s = settings.backlog_wait_s
        self._clock = clock
        self._changed = Condition()
        self._urgent: deque[LoadJob | UseJob] = deque()
        self._saves: deque[SaveJob | FlushJob] = deque()
        self._doing: Job | None = None
        self._is_closing = False
        self._drops_late = True
        self.save_bytes = 0

    # Asked by the engine's thread

    def has_room(self, nbytes: int) -> bool:
        """Returns whether a save of so many bytes should be given now."""
        backlog = max(1, self._size // BACKLOG_SHARE)
        with self._changed:
            is_short = len(self._saves) < self._size + backlog
            # One record alone may be larger than the bound.
            return is_short and self.save_bytes + nbytes <= max(self._max_bytes, nbytes)

    @property
    def num_saves(self) -> int:
        """Counts the saves that wait and the one that is being written."""
        with self._changed:
            waiting = sum(isinstance(job, SaveJob) for job in self._saves)
            return waiting + isinstance(self._doing, SaveJob)

    def put(self, job: Job) -> None:
        with self._changed:
            if isinstance(job, LoadJob | UseJob):
                self._urgent.append(job)
            else:
                self._put_save(job)
            self._changed.notify_all()

    def take_cancelled(self) -> list[SaveJob]:
        """Takes out what was cancelled before it was begun, and returns the saves among it."""
        with self._changed:
            self._urgent = deque(
                job for job in self._urgent if isinstance(job, UseJob) or not job.is_cancelled
            )
            return self._take_saves([job for job in self._waiting() if job.is_cancelled])

    def keep_late(self) -> None:
        """Lets nothing be given up any more because it waits long."""
        with self._changed:
            self._drops_late = False

    def close(self) -> None:
        """Lets the io thread end once all saves are done, and drops the restores that wait."""
        with self._changed:
            self._is_closing = True
            self._urgent.clear()
            self._changed.notify_all()

    def abandon(self) -> list[SaveJob]:
        """Cancels and returns the saves that are left, also the one that is being written."""
        with self._changed:
            left = self._take_saves(self._waiting())
            if isinstance(self._doing, SaveJob):
                left.append(self._doing)
            for job in left:
                job.is_cancelled = True
            return left

    # Asked by the io thread

    def take(self, nap_s: float) -> Job | None:
        """Returns the next job, after a wait of at most `nap_s` where there is none; then None."""
        with self._changed:
            if not (self._urgent or self._saves or self._is_closing):
                self._changed.wait(nap_s)
            waiting: deque[LoadJob | UseJob] | deque[SaveJob | FlushJob]
            waiting = self._urgent or self._saves
            self._doing = waiting.popleft() if waiting else None
            return self._doing

    def finish(self, job: Job) -> None:
        """Notes that the job that was taken last is done."""
        with self._changed:
            self._doing = None
            if isinstance(job, SaveJob):
                self.save_bytes -= job.nbytes

    def take_late(self) -> list[SaveJob]:
        """Takes out what came to a full queue and waited too long, while there are more than its
        size."""
        with self._changed:
            if len(self._saves) <= self._size or not self._drops_late:
                return []
            now_s = self._clock.monotonic_s()
            return self._take_saves([job for job in self._waiting() if job.give_up_at_s < now_s])

    @property
    def is_closing(self) -> bool:
        with self._changed:
            return self._is_closing

    def sleep(self, seconds: float) -> None:
        """Waits for so long, or until the closing."""
        with self._changed:
            self._changed.wait_for(lambda: self._is_closing, seconds)

    # Under the lock

    def _put_save(self, job: SaveJob | FlushJob) -> None:
        if isinstance(job, SaveJob):
            self.save_bytes += job.nbytes
            if len(self._saves) >= self._size:
                job.give_up_at_s = self._clock.monotonic_s() + self._backlog_wait_s
        self._saves.append(job)

    def _waiting(self) -> list[SaveJob]:
        return [job for job in self._saves if isinstance(job, SaveJob)]

    def _take_saves(self, jobs: list[SaveJob]) -> list[SaveJob]:
        taken = {id(job) for job in jobs}
        self._saves = deque(job for job in self._saves if id(job) not in taken)
        self.save_bytes -= sum(job.nbytes for job in jobs)
        return jobs
