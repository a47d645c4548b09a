"""What an operator can set about the disk tier."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Policy = Literal["evict_only", "write_through"]
Durability = Literal["best_effort", "persistent"]

GIB = 1 << 30
DAY_S = 86_400.0


@dataclass(frozen=True, slots=True)
class TierSettings:
    """The first eight follow the flags of the disk tier; the rest are bounds with no flag.

    `max_size_bytes` and `ttl_s`: 0 is unlimited. `max_pending_bytes` bounds what waits for the
    writer in memory, next to `writer_queue_size` records. `backlog_wait_s` is how long a record
    that came to a full queue may wait for its turn before it is dropped.
    """

    cache_dir: Path
    policy: Policy = "evict_only"
    durability: Durability = "best_effort"
    async_writes: bool = True
    max_size_bytes: int = 50 * GIB
    ttl_s: float = 7 * DAY_S
    writer_queue_size: int = 512
    persistent_max_retries: int = 3
    flush_interval_s: float = 1.0
    max_pending_bytes: int = 256 << 20
    backlog_wait_s: float = 0.5
    free_share: float = 0.8
    max_evictions_per_save: int = 16
    inline_loads_per_step: int = 4

    @property
    def is_persistent(self) -> bool:
        return self.durability == "persistent"

    @property
    def writes_through(self) -> bool:
        return self.policy == "write_through"
