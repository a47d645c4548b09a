"""Time for the disk tier: wall time, which outlives a restart, that never jumps while we run."""

from __future__ import annotations

import time
from typing import Protocol

TICK_S = 60.0


class Clock(Protocol):
    def wall_s(self) -> float:
        """Returns seconds since 1970, as the machine's clock is set."""

    def monotonic_s(self) -> float:
        """Returns seconds since some point, never fewer than before."""


class SystemClock:
    def wall_s(self) -> float:
        return time.time()

    def monotonic_s(self) -> float:
        return time.monotonic()


class Ticks:
    """Counts time in ticks of a minute, for last uses: what is used within one tick is equally old,
    so a chain of blocks keeps one age, and few rows are written for uses.

    The wall clock is read once and the monotonic one added to it: a clock that is set while we
    run expires nothing.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._started_wall_s = clock.wall_s()
        self._started_s = clock.monotonic_s()

    def now(self) -> int:
        passed_s = self._clock.monotonic_s() - self._started_s
        return self.of(self._started_wall_s + passed_s)

    @staticmethod
    def of(wall_s: float) -> int:
        return int(wall_s // TICK_S)
