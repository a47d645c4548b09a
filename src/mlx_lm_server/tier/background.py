"""How the tier's threads share the cores."""

from __future__ import annotations

import os
from contextlib import suppress

from mlx_lm_server import platform


def never_interrupt() -> None:
    """Makes the calling thread wait for a core or for its turn, where the system knows that. Else
    a thread that wakes up takes a core from one that computes, and the other threads of a product
    then wait for that one. Its share stays what it is: a lower one would let it hold the
    interpreter's lock while it waits."""
    if platform.is_linux():
        with suppress(OSError):
            os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
