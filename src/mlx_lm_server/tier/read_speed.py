"""Learns from restores that were done how fast they are."""

from __future__ import annotations

FIRST_GUESS_BYTES_PER_S = 500e6
KEPT_SHARE = 0.9  # of what earlier reads weigh, per read
SMALLEST_S = 1e-6


class ReadSpeed:
    """A decaying mean over bytes, so that large reads say more. Owned by the engine's thread."""

    def __init__(self) -> None:
        self._bytes = 0.0
        self._seconds = 0.0

    def note(self, nbytes: int, seconds: float) -> None:
        if nbytes:
            self._bytes = self._bytes * KEPT_SHARE + nbytes
            self._seconds = self._seconds * KEPT_SHARE + max(seconds, SMALLEST_S)

    @property
    def bytes_per_s(self) -> float:
        return self._bytes / self._seconds if self._seconds else FIRST_GUESS_BYTES_PER_S

    def forecast_s(self, nbytes: int) -> float:
        return nbytes / self.bytes_per_s
