"""What is set about the disk tier: by an operator, or here."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from mlx_lm_server.config import TierConfig


@dataclass(frozen=True, slots=True)
class TierSettings:
    """The flags as they were given, the folder that they lead to, and bounds that have no flag.

    `max_pending_bytes` bounds what waits for the writer in memory, next to `ssd_writer_queue_size`
    records. `backlog_wait_s` is how long a record that came to a full queue may wait for its turn
    before it is dropped.
    """

    cache_dir: Path
    flags: TierConfig = field(default_factory=TierConfig)
    max_pending_bytes: int = 256 << 20
    backlog_wait_s: float = 0.5
    free_share: float = 0.8
    max_evictions_per_save: int = 16
    inline_loads_per_step: int = 4
