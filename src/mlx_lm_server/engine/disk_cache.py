"""The disk tier as the core and the runner see it."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Sequence

import msgspec

from mlx_lm_server.core.tier import Label
from mlx_lm_server.tier import Namespace, Prefetched, Record, SsdStore, TierSettings, Wanted
from mlx_lm_server.tier_stats import TierCounters, TierStats

log = logging.getLogger(__name__)

OPEN_LIMIT_S = 2.0
LOOK_S = 0.002
STATS_EVERY_S = 0.2
# A graceful stop takes at most so long for what only memory has, and so long to close.
FLUSH_LIMIT_S, CLOSE_LIMIT_S = 10.0, 5.0


class DiskCache:
    """Owned by the EngineCore; `core.Tier` for the scheduler. Used on the engine's main thread
    only. `fits` says whether a record could be of this model."""

    def __init__(
        self,
        settings: TierSettings,
        namespace: Namespace,
        fits: Callable[[Record], bool],
        store: SsdStore | None = None,
    ) -> None:
        self._store = store or SsdStore(settings, namespace)
        self._fits = fits
        self._num_reads = 0
        self._ended: list[Prefetched] = []
        self._found: dict[bytes, Record] = {}  # by the last `poll`
        self.writes_through = settings.flags.writes_through
        self.folder = str(settings.cache_dir / namespace.folder)
        self._counters = TierCounters()
        self._stats = TierStats()
        self._stats_until_s = 0.0

    def wait_until_open(self) -> None:
        """For a bounded time: the first request should find what is there."""
        ends_s = time.monotonic() + OPEN_LIMIT_S
        while not self._store.is_open and time.monotonic() < ends_s:
            self.look()
            time.sleep(LOOK_S)
        if not self._store.is_open:
            log.warning("the disk tier is not open after %g s; it begins empty", OPEN_LIMIT_S)

    # ---- core.Tier

    def look(self) -> None:
        self._ended += self._store.poll()

    def has(self, name: bytes) -> bool:
        return self._store.has(name)

    def has_room(self, num_bytes: int) -> bool:
        return self._store.room_for(num_bytes)

    def note_refused(self) -> None:
        self._counters.write_drops += 1

    def size_of(self, name: bytes) -> int:
        return self._store.size_of(name)

    def read_forecast_s(self, names: Iterable[bytes]) -> float:
        return self._store.read_forecast_s(names)

    def fetch(self, labels: Sequence[Label]) -> int:
        wanted = [Wanted(label.name, label.token_ids) for label in labels]
        self._num_reads += 1
        self._store.prefetch(wanted, owner=str(self._num_reads))
        return self._num_reads

    def cancel(self, read: int) -> None:
        self._store.abort(str(read))

    def poll(self) -> list[tuple[int, int]]:
        self.look()
        ended, self._ended = self._ended, []
        found = [(int(read.ticket.owner), self._fitting(read.records)) for read in ended]
        self._found = {record.name: record for _, records in found for record in records}
        return [(read, len(records)) for read, records in found]

    def use(self, names: Sequence[bytes]) -> None:
        self._store.use(names)

    def _fitting(self, records: Sequence[Record]) -> list[Record]:
        """Up to the first that is not this model's."""
        for number, record in enumerate(records):
            if not self._fits(record):
                log.error("the disk tier has a record of another shape: %s", record.name.hex())
                return list(records[:number])
        return list(records)

    # ---- the runner and the engine

    def save(self, record: Record) -> None:
        self._store.save(record)

    def found(self, name: bytes) -> Record:
        """Returns a record that the last `poll` has found."""
        return self._found[name]

    def keep_late(self) -> None:
        """From now on the engine only stops: what waits for the disk is not dropped."""
        self._store.keep_late()

    def wait_for_room(self, limit_s: float) -> bool:
        return self._store.wait_for_room(1, limit_s)

    def close(self, limit_s: float) -> None:
        if not self._store.close(limit_s):
            log.warning("the disk tier was closed before all was written")

    def stats(self, restored_tokens: int) -> TierStats:
        """Not older than a fraction of a second; `restored_tokens` is the core's count."""
        now_s = time.monotonic()
        if now_s >= self._stats_until_s:
            self._stats, self._stats_until_s = self._count(restored_tokens), now_s + STATS_EVERY_S
        return self._stats

    def _count(self, restored_tokens: int) -> TierStats:
        self._counters.restored_tokens = restored_tokens
        stats = self._store.stats()
        return msgspec.structs.replace(stats, counters=stats.counters.plus(self._counters))
