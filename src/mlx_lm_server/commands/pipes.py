"""Output that somebody may stop reading."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

# As shells say of a program that SIGPIPE has ended.
EXIT_NOBODY_READS = 141


@contextmanager
def ending_when_nobody_reads() -> Iterator[None]:
    """Ends the program in silence where `| head` has seen enough: Python would complain."""
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(EXIT_NOBODY_READS) from None
