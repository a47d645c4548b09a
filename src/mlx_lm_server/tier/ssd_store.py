"""The disk tier as the engine's thread sees it.

Each step the engine polls, uses what was read, and saves what leaves. In the step loop no call
waits for the disk (with inline writes `save` and `poll` do the work themselves, a bounded amount);
outside of it `wait_for_room`, `flush` and `close` do. Every failure of the disk is a record that is
absent.

    store.poll()                       → reads that have ended, once a step
    store.has(name)                    known to be on disk, or on its way there
    store.begin_save(n) → save(…)      asked before the bytes are extracted
    store.prefetch(wanted, owner)      while the request waits in the queue
    store.abort(owner)                 its saves leave no file, its reads give nothing
"""

from __future__ import annotations

import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Sequence

from mlx_lm_server.tier.clock import Clock, SystemClock
from mlx_lm_server.tier.disk import DiskTier
from mlx_lm_server.tier.files import Files, OsFiles
from mlx_lm_server.tier.io_side import InlineIo, IoSide, IoThread
from mlx_lm_server.tier.jobs import (
    Event,
    FlushJob,
    Found,
    Gone,
    LoadJob,
    Paused,
    Read,
    Saved,
    SaveJob,
    UseJob,
)
from mlx_lm_server.tier.layout import Namespace
from mlx_lm_server.tier.mailbox import Mailbox
from mlx_lm_server.tier.read_speed import ReadSpeed
from mlx_lm_server.tier.records import Prefetched, Record, Ticket, Wanted
from mlx_lm_server.tier.settings import TierSettings
from mlx_lm_server.tier_stats import TierCounters, TierStats

ROOM_LOOKS_S = 0.002


class SsdStore:
    """Owned by the engine's thread. `wake` is called by the io side when `poll` has news."""

    def __init__(
        self,
        settings: TierSettings,
        namespace: Namespace,
        *,
        files: Files | None = None,
        clock: Clock | None = None,
        wake: Callable[[], None] = lambda: None,
    ) -> None:
        self._clock = clock or SystemClock()
        self._events: deque[Event] = deque()
        self._wake = wake
        self._counters = TierCounters()
        self._sizes: dict[bytes, int] = {}
        self._saving: dict[bytes, SaveJob] = {}
        self._saves_of: defaultdict[str, set[SaveJob]] = defaultdict(set)
        self._reads: dict[int, LoadJob] = {}
        self._ended_reads: list[Prefetched] = []
        self._num_tickets = 0
        self._paused_until_s = 0.0
        self._speed = ReadSpeed()
        self._has_opened = self._is_closed = False

        def make_disk(wait: Callable[[float], None]) -> DiskTier:
            return DiskTier(settings, namespace, files or OsFiles(), self._clock, self._emit, wait)

        self._io: IoSide
        if settings.flags.ssd_async_writes:
            self._io = IoThread(make_disk, Mailbox(settings, self._clock), settings)
        else:
            self._io = InlineIo(make_disk, settings)

    # What is there ------------------------------------------------------------------------------

    def has(self, name: bytes) -> bool:
        """Returns whether it is on disk as far as is known, or on its way there. Reading it may
        still find nothing."""
        return name in self._sizes or name in self._saving

    def size_of(self, name: bytes) -> int:
        """Returns how many bytes a read would move; 0 where there is nothing to read."""
        return self._sizes.get(name, 0)

    def read_forecast_s(self, names: Iterable[bytes]) -> float:
        """Returns how long a prefetch of these would take now, those before it included."""
        waiting = sum(job.nbytes for job in self._reads.values())
        return self._speed.forecast_s(waiting + sum(map(self.size_of, names)))

    def use(self, names: Sequence[bytes]) -> None:
        """Notes that these were used from memory, so that they stay on disk too."""
        self._put(UseJob(tuple(names)))

    # Writing ------------------------------------------------------------------------------------

    def room_for(self, nbytes: int) -> bool:
        """Returns whether a record of so many bytes would be taken now. Asks no disk."""
        return self._can_take(nbytes) and self._io.has_room(nbytes)

    def begin_save(self, nbytes: int) -> bool:
        """Returns `room_for`, and counts the drop where there is none. To be asked before the bytes
        are extracted."""
        if self.room_for(nbytes):
            return True
        self._counters.write_drops += 1
        return False

    def save(self, record: Record, owner: str = "") -> bool:
        """Takes a record; False where it is stored or on its way already, or the store is closed.
        It asks for no room: that is for who calls it. Until the save's end the record's bytes must
        not change. `abort(owner)` cancels it; a save without an owner cannot be aborted."""
        assert all(tensor.is_consistent for tensor in record.tensors), "shape and bytes disagree"
        if self._is_closed or self.has(record.name):
            return False
        job = SaveJob(record, owner, record.nbytes)
        self._counters.saves += 1
        self._saving[record.name] = job
        if owner:
            self._saves_of[owner].add(job)
        self._put(job)
        return True

    def keep_late(self) -> None:
        """Lets no record be dropped any more because its turn does not come soon; for a graceful
        stop, which saves more than the queue takes."""
        self._io.keep_late()

    def wait_for_room(self, nbytes: int, timeout_s: float) -> bool:
        """Waits until a record of so many bytes would be taken; False where that takes longer. Not
        for the step loop."""
        ends_s = time.monotonic() + timeout_s
        while not self.room_for(nbytes):
            if self._is_closed or time.monotonic() >= ends_s:
                return False
            time.sleep(ROOM_LOOKS_S)
            self._take_events()
        return True

    # Reading ------------------------------------------------------------------------------------

    def prefetch(self, wanted: Sequence[Wanted], owner: str) -> Ticket:
        """Begins to read these, in this order, up to the first that is absent. `poll` gives them
        back together, so what the others are useless without comes first."""
        self._num_tickets += 1
        ticket = Ticket(self._num_tickets, owner)
        at_hand = {
            each.name: self._saving[each.name].record
            for each in wanted
            if each.name in self._saving
        }
        nbytes = sum(self.size_of(each.name) for each in wanted)
        job = LoadJob(ticket, tuple(wanted), at_hand, nbytes)
        self._reads[ticket.number] = job
        self._put(job)
        return ticket

    def poll(self) -> list[Prefetched]:
        """Returns the reads that have ended since the last call. To be called once a step."""
        if not self._is_closed:
            self._io.work()
        self._take_events()
        ended, self._ended_reads = self._ended_reads, []
        return ended

    # Ending -------------------------------------------------------------------------------------

    def abort(self, owner: str) -> None:
        """Forgets an owner's saves and reads that have not ended. Its name is free at once."""
        self._cancel(self._saves_of.pop(owner, set()))
        self._cancel_reads([job for job in self._reads.values() if job.ticket.owner == owner])
        self._ended_reads = [read for read in self._ended_reads if read.ticket.owner != owner]

    def reset(self) -> None:
        """Aborts everybody, also saves without an owner."""
        self._cancel(list(self._saving.values()))
        self._cancel_reads(list(self._reads.values()))
        self._ended_reads.clear()

    def flush(self, timeout_s: float) -> bool:
        """Waits until all that was saved is on disk and in the index, or given up; False where time
        ran out."""
        job = FlushJob()
        self._put(job)
        is_done = job.done.wait(timeout_s)
        self._take_events()
        return is_done

    def close(self, timeout_s: float) -> bool:
        """Writes what waits, commits and closes. False where records were dropped because time ran
        out."""
        if self._is_closed:
            return True
        self._cancel_reads(list(self._reads.values()))
        self._ended_reads.clear()
        self._is_closed = True
        late = self._io.close(timeout_s)
        self._take_events()
        self._counters.write_drops += len(late)
        for job in late:
            self._end_save(job)
        return not late

    @property
    def is_open(self) -> bool:
        """Whether the folder's index has been read; until then nothing on disk is known."""
        return self._has_opened

    def stats(self) -> TierStats:
        disk = self._io.disk
        return TierStats(
            counters=self._counters.plus(disk.counters),
            stored_records=len(self._sizes),
            used_bytes=disk.used_bytes,
            limit_bytes=disk.limit_bytes,
            pending_saves=self._io.num_saves,
            pending_bytes=self._io.save_bytes,
            pending_reads=len(self._reads),
            is_paused=self._is_paused,
            is_open=self.is_open,
            read_bytes_per_s=self._speed.bytes_per_s,
        )

    def _can_take(self, nbytes: int) -> bool:
        return not (self._is_closed or self._is_paused) and nbytes <= self._io.disk.limit_bytes

    @property
    def _is_paused(self) -> bool:
        """Whether errors came so lately that the disk is not worth another try yet."""
        return self._clock.monotonic_s() < self._paused_until_s

    # Inside -------------------------------------------------------------------------------------

    def _put(self, job: SaveJob | LoadJob | UseJob | FlushJob) -> None:
        if self._is_closed:
            if isinstance(job, LoadJob):
                self._events.append(Read(job, (), 0.0))
            elif isinstance(job, FlushJob):
                job.done.set()
            return
        self._io.put(job)

    def _emit(self, event: Event) -> None:
        """Takes an event of the io side, which calls this on its own thread."""
        self._events.append(event)
        self._wake()

    def _take_events(self) -> None:
        while self._events:
            event = self._events.popleft()
            match event:
                case Saved():
                    self._end_save(event.job)
                    if event.size:
                        self._sizes[event.job.record.name] = event.size
                case Read():
                    self._end_read(event)
                case Found():
                    self._has_opened = True
                    if len(event.sizes) > len(self._sizes):
                        self._sizes, fewer = event.sizes, self._sizes
                        self._sizes |= fewer
                    else:
                        self._sizes |= event.sizes
                case Gone():
                    for name in event.names:
                        self._sizes.pop(name, None)
                case Paused():
                    self._paused_until_s = event.until_s

    def _end_read(self, event: Read) -> None:
        job = event.job
        if self._reads.pop(job.ticket.number, None) is None:
            return  # aborted
        disk_bytes = sum(
            record.nbytes for record in event.records if record.name not in job.at_hand
        )
        self._speed.note(disk_bytes, event.read_s)
        self._ended_reads.append(Prefetched(job.ticket, event.records, event.read_s))

    def _end_save(self, job: SaveJob) -> None:
        if self._saving.get(job.record.name) is job:
            del self._saving[job.record.name]
        if job.owner in self._saves_of:
            self._saves_of[job.owner].discard(job)
            if not self._saves_of[job.owner]:
                del self._saves_of[job.owner]

    def _cancel(self, jobs: Iterable[SaveJob]) -> None:
        """Cancels saves: those that are waiting end here, the one that is being written ends on the
        io side."""
        for job in jobs:
            job.is_cancelled = True
            self._end_save(job)
        self._counters.saves_cancelled += len(self._io.take_cancelled())

    def _cancel_reads(self, jobs: Iterable[LoadJob]) -> None:
        for job in jobs:
            job.is_cancelled = True
            del self._reads[job.ticket.number]
