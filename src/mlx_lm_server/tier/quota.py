"""Limits how much the tier may take."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from mlx_lm_server.tier.files import Files

UNLIMITED = 1 << 62


class Quota:
    """Knows the least of what the operator set and a share of what is free or ours. Owned by the io
    side."""

    def __init__(self, root: Path, files: Files, max_bytes: int, free_share: float) -> None:
        self._root = root
        self._files = files
        self._max_bytes = max_bytes or UNLIMITED
        self._free_share = free_share
        self.limit_bytes = self._max_bytes

    def measure(self, used_bytes: int) -> None:
        """Asks again what is free; where that fails the limit stays what it was."""
        with suppress(OSError):
            free = self._files.free_bytes(self._root)
            share = int(self._free_share * (free + used_bytes))
            self.limit_bytes = min(self._max_bytes, share)
