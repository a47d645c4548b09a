"""What is on the disk and how much of it may stay: index, limit and eviction in one place.

Owned by the io side, used by its writer, reader and sweep.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

import msgspec

from mlx_lm_server.tier.clock import TICK_S, Clock, Ticks
from mlx_lm_server.tier.files import Files, write_file
from mlx_lm_server.tier.index import (
    BUSY_TIMEOUT_S,
    Index,
    IndexCorruptError,
    IndexUnavailableError,
    Victim,
)
from mlx_lm_server.tier.jobs import Emit, Found, Gone, Paused
from mlx_lm_server.tier.layout import SHARDS, CacheLayout, Namespace
from mlx_lm_server.tier.quota import Quota
from mlx_lm_server.tier.settings import TierSettings
from mlx_lm_server.tier_stats import TierCounters

log = logging.getLogger(__name__)

INLINE_BUSY_TIMEOUT_S = 0.01
REOPEN_S = 5.0
# Evicting a little more than is needed lets the saves that follow go without a transaction.
SLACK_SHARE = 64

Answer = TypeVar("Answer")


class Shelf:
    """The cache folder as one namespace's server sees it."""

    def __init__(
        self, settings: TierSettings, namespace: Namespace, files: Files, clock: Clock, emit: Emit
    ) -> None:
        self.settings = settings
        self.files = files
        self.clock = clock
        self.ticks = Ticks(clock)
        self.emit = emit
        self.counters = TierCounters()
        self.layout = CacheLayout(settings.cache_dir)
        self.namespace = namespace.folder
        self._about = namespace
        self.index = Index(
            self.layout.index,
            self.namespace,
            files,
            BUSY_TIMEOUT_S if settings.flags.ssd_async_writes else INLINE_BUSY_TIMEOUT_S,
        )
        self.quota = Quota(
            self.layout.root, files, settings.flags.max_size_bytes, settings.free_share
        )
        self._open_again_at_s = 0.0
        self.is_new = False  # whether the index was opened since the last sweep
        self.is_in_doubt = False  # whether index and files were found to disagree

    # The index ---------------------------------------------------------------------------------

    def open(self) -> bool:
        """Makes the folders and opens the index; where that fails, `keep_open` tries again."""
        self._open_again_at_s = self.clock.monotonic_s() + REOPEN_S
        with suppress(OSError):
            self.make_folders()
        try:
            self._open_index()
        except IndexUnavailableError as error:
            self.counters.index_errors += 1
            log.warning("the index of the disk tier cannot be opened: %s", error)
            self.emit(Paused(self._open_again_at_s))
            return False
        self.is_new = True
        self.quota.measure(self.index.used_bytes)
        self.emit(Found(self.index.sizes))
        return True

    def keep_open(self) -> None:
        """Opens the index again where it was closed, deleted or replaced."""
        if self.index.is_open and not self.index.has_been_replaced:
            return
        if self.clock.monotonic_s() >= self._open_again_at_s:
            self.open()

    def commit(self) -> None:
        """Writes the index's changes; what cannot be written now waits."""
        none: dict[bytes, int] = {}
        news = self.ask(self.index.commit, none)
        if news:
            self.emit(Found(news))

    def ask(self, question: Callable[[], Answer], default: Answer) -> Answer:
        """Returns what the index says, or the default where it cannot; a corrupt one is built
        anew."""
        try:
            return question()
        except IndexUnavailableError:
            self.counters.index_errors += 1
        except IndexCorruptError as error:
            log.warning("the index of the disk tier is corrupt and is built anew: %s", error)
            self._rebuild()
        return default

    def close(self) -> None:
        self.commit()
        self.index.close()

    def _open_index(self) -> None:
        now, is_durable = self.ticks.now(), self.settings.flags.is_persistent
        try:
            self.index.open(now, is_durable=is_durable)
        except IndexCorruptError:
            self.counters.index_rebuilds += 1
            self.index.discard_file()
            try:
                self.index.open(now, is_durable=is_durable)
            except IndexCorruptError as error:
                raise IndexUnavailableError(str(error)) from error

    def _rebuild(self) -> None:
        self.counters.index_rebuilds += 1
        self.index.discard_file()
        self.open()

    # Folders -----------------------------------------------------------------------------------

    def path(self, name: bytes) -> Path:
        return self.layout.record(self.namespace, name)

    def make_folders(self) -> None:
        """Makes those of the namespace, and the file that says whose it is. Raises OSError."""
        self.files.make_folder(self.layout.temporary_folder(self.namespace))
        for shard in SHARDS:
            self.files.make_folder(self.layout.shard(self.namespace, shard))
        meta = self.layout.meta(self.namespace)
        with suppress(OSError):
            self.files.facts(meta)
            return
        about = {"digest": self._about.digest.hex(), "about": dict(self._about.about)}
        text = msgspec.json.format(msgspec.json.encode(about), indent=1)
        temporary = self.layout.temporary(self.namespace)
        try:
            write_file(self.files, temporary, [memoryview(text)])
            self.files.rename(temporary, meta)
        except OSError:
            self.remove_quietly(temporary)
            raise

    def remove_quietly(self, path: Path) -> bool:
        """Returns whether the file is gone."""
        try:
            self.files.unlink(path)
        except FileNotFoundError:
            return True
        except OSError:
            self.is_in_doubt = True
            return False
        return True

    # Room --------------------------------------------------------------------------------------

    def make_room(self, nbytes: int) -> bool:
        """Returns whether a file of that size may be written, after a bounded number of
        evictions."""
        limit = self.quota.limit_bytes
        if self._fits(nbytes):
            return True
        if nbytes > limit:
            return False
        slack = min(limit // SLACK_SHARE, self.settings.max_evictions_per_save * nbytes)
        self.evict(limit - nbytes - slack)
        return self._fits(nbytes)

    def evict(self, goal_bytes: int) -> None:
        """Removes the oldest until the goal is met, a bounded number of them."""
        self.commit()
        for victim in self._oldest():
            if self.index.used_bytes <= goal_bytes:
                return
            self.counters.evictions += self._remove(victim)

    def keep_within_limits(self) -> None:
        """Does a bounded step towards size limit and age limit; once in a flush interval."""
        self.quota.measure(self.index.used_bytes)
        if self.index.used_bytes > self.quota.limit_bytes:
            self.evict(self.quota.limit_bytes)
        if not self.settings.flags.ttl_s:
            return
        oldest_tick = self.ticks.now() - int(self.settings.flags.ttl_s / TICK_S)
        for victim in self._oldest(before=oldest_tick):
            self.counters.expired += self._remove(victim)

    def forget(self, name: bytes) -> None:
        self.index.forget(name)
        self.emit(Gone((name,)))

    def _oldest(self, before: int | None = None) -> list[Victim]:
        at_most = self.settings.max_evictions_per_save
        none: list[Victim] = []
        return self.ask(lambda: self.index.oldest(at_most, before), none)

    def _fits(self, nbytes: int) -> bool:
        return self.index.used_bytes + nbytes <= self.quota.limit_bytes

    def _remove(self, victim: Victim) -> bool:
        if not self.remove_quietly(self.layout.record(victim.namespace, victim.name)):
            self.index.pass_over(victim)
            return False
        self.index.forget_victim(victim)
        if victim.namespace == self.namespace:
            self.emit(Gone((victim.name,)))
        return True
