"""Large bodies and texts, one after the other on a thread of their own: while it lasts, the work on
one may take many times its size, and not that of all clients at once. The memory goes back to the
system when it is done."""

from __future__ import annotations

import asyncio
import ctypes
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

Result = TypeVar("Result")
_thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="large-work")


async def run_large(work: Callable[[], Result]) -> Result:
    """Returns or raises what `work` does; the event loop goes on meanwhile."""
    return await asyncio.get_running_loop().run_in_executor(_thread, _run, work)


def _run(work: Callable[[], Result]) -> Result:
    try:
        return work()
    finally:
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's
        if trim is not None:
            trim(0)
