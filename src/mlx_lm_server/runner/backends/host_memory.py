"""How the C library keeps the engine's memory, where arrays live in it (MLX on a Linux CPU).

By default glibc gives each large block back to the system when it is freed, and every temporary
array pays for fresh, zeroed pages again: about a third of a long prefill. What is never given back
is still fresh once: `HeapUpkeep` lets another thread find those pages.
"""

from __future__ import annotations

import ctypes
import math
import time
from collections.abc import Callable

from mlx_lm_server import platform
from mlx_lm_server.protocol import MemoryPressure

M_TRIM_THRESHOLD = -1
M_MMAP_THRESHOLD = -3
LARGEST_KEPT_BYTES = 1 << 30
NEVER_TRIM = 2**31 - 1
# Free memory at the end of the heap whose pages are there, in bytes: what slabs, blocks and
# temporary arrays of the next steps may want at once. No more than such a share of the limit.
MOST_AHEAD, MOST_AHEAD_SHARE = 160 << 20, 1 / 32
LEAST_SHARE_OF_MOST = 2 / 3
STEPS_BETWEEN_LOOKS = 32
IDLE_BEFORE_TRIM_S = 60.0


def keep_freed_blocks() -> None:
    """Serve large blocks from the heap and keep them when they are freed."""
    if (libc := _glibc()) is not None:
        libc.mallopt(M_MMAP_THRESHOLD, LARGEST_KEPT_BYTES)
        libc.mallopt(M_TRIM_THRESHOLD, NEVER_TRIM)


def give_back_freed_blocks() -> None:
    """Return what is free to the system; for idle times."""
    if (libc := _glibc()) is not None:
        libc.malloc_trim(0)


class HeapUpkeep:
    """What is done about it between steps. Used on the engine's main thread. `grow_ahead` lets
    another thread find pages, where there is something that can."""

    def __init__(
        self,
        memory_limit_bytes: int,
        grow_ahead: Callable[..., object] | None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._most_ahead = min(MOST_AHEAD, int(MOST_AHEAD_SHARE * memory_limit_bytes))
        self._clock = clock
        self._grow_ahead = None if _glibc() is None else grow_ahead
        self._num_steps = 0
        self._idle_since_s: float | None = None

    @property
    def pressure(self) -> MemoryPressure:
        """Always "normal": the system's is not asked for where arrays lie in host memory."""
        return "normal"

    @property
    def cache_share(self) -> float:
        return 1.0

    def after_step(self, *, took_memory: bool) -> None:
        """Looks whether enough of the heap is there, where much was taken and now and then."""
        self._idle_since_s = None
        self._num_steps += 1
        if took_memory or self._num_steps % STEPS_BETWEEN_LOOKS == 0:
            self._look()

    def rest(self) -> None:
        """There is nothing to do: look at once, and after a while give back what is free, once."""
        now_s = self._clock()
        if self._idle_since_s is None:
            self._idle_since_s = now_s
            self._look()
        elif now_s - self._idle_since_s > IDLE_BEFORE_TRIM_S:
            give_back_freed_blocks()
            self._idle_since_s = math.inf

    def _look(self) -> None:
        if self._grow_ahead is not None:
            least = int(LEAST_SHARE_OF_MOST * self._most_ahead)
            self._grow_ahead(ctypes.c_size_t(least), ctypes.c_size_t(self._most_ahead))


def _glibc() -> ctypes.CDLL | None:
    if not platform.is_linux():
        return None
    libc = ctypes.CDLL(None)
    return libc if hasattr(libc, "malloc_trim") and hasattr(libc, "mallopt") else None
