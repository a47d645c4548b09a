"""How the C library keeps the engine's memory, where arrays live in it (MLX on a Linux CPU).

By default glibc gives each large block back to the system when it is freed, and every temporary
array pays for fresh, zeroed pages again: about a third of a long prefill.
"""

from __future__ import annotations

import ctypes
import sys

M_TRIM_THRESHOLD = -1
M_MMAP_THRESHOLD = -3
LARGEST_KEPT_BYTES = 1 << 30
NEVER_TRIM = 2**31 - 1


def keep_freed_blocks() -> None:
    """Serve large blocks from the heap and keep them when they are freed."""
    if (libc := _glibc()) is not None:
        libc.mallopt(M_MMAP_THRESHOLD, LARGEST_KEPT_BYTES)
        libc.mallopt(M_TRIM_THRESHOLD, NEVER_TRIM)


def give_back_freed_blocks() -> None:
    """Return what is free to the system; for idle times."""
    if (libc := _glibc()) is not None:
        libc.malloc_trim(0)


def _glibc() -> ctypes.CDLL | None:
    if sys.platform != "linux":
        return None
    libc = ctypes.CDLL(None)
    return libc if hasattr(libc, "malloc_trim") and hasattr(libc, "mallopt") else None
