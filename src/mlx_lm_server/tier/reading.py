"""Reads whole files, several at a time: one after the other leaves a fast medium idle.

In C where it can be compiled (native/files), else in Python's threads, which hand the interpreter's
lock to each other and take seven times the CPU time.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import threading
import weakref
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future
from itertools import accumulate
from pathlib import Path
from pickle import PickleBuffer

from mlx_lm_server.tier.background import never_interrupt
from mlx_lm_server.tier.native_files import files_library

FILES_AT_A_TIME = 4
# Of memory for files that nobody looks at any more so much is kept for the next.
MAX_IDLE_BUFFERS, MAX_IDLE_BYTES = 4, 8 << 20

Contents = memoryview | OSError
ReadOne = Callable[[Path, int], bytes]


class FilesReader:
    """Owned by one thread; what it has read may be dropped by any. `read_one` reads up to so many
    bytes of a file where there is no library."""

    def __init__(self, read_one: ReadOne) -> None:
        self._library = files_library()
        self._read_one = read_one
        self._idle: list[mmap.mmap] = []

    def read(self, paths: Sequence[Path], max_bytes: Sequence[int]) -> Generator[Contents]:
        """Yields each file's first bytes, or why it cannot be read, in order and as soon as that is
        known. They are read from the first `next` on, a few at a time; closing the generator ends
        it."""
        if self._library is None:
            return _read_in_threads(self._read_one, paths, max_bytes)
        return self._read_in_c(self._library, paths, max_bytes)

    def _read_in_c(
        self, library: ctypes.CDLL, paths: Sequence[Path], max_bytes: Sequence[int]
    ) -> Generator[Contents]:
        num_files, page = len(paths), mmap.PAGESIZE
        starts = list(accumulate((-(-size // page) * page for size in max_bytes), initial=0))
        memory, first = self._memory(starts[-1])
        names = (ctypes.c_char_p * num_files)(*map(os.fsencode, paths))
        into = (ctypes.c_void_p * num_files)(*(first + start for start in starts[:-1]))
        sizes = (ctypes.c_long * num_files)(*max_bytes)
        reading = library.begin_reading(num_files, names, into, sizes, FILES_AT_A_TIME)
        if not reading:
            raise MemoryError("no memory to read files")
        try:
            for number, start in enumerate(starts[:-1]):
                result = library.result_of(reading, number)
                if result >= 0:
                    yield memory[start : start + result]
                else:
                    yield OSError(-result, os.strerror(-result), str(paths[number]))
        finally:
            library.end_reading(reading)

    def _memory(self, num_bytes: int) -> tuple[memoryview, int]:
        """Returns pages and their address. They are used again once no view of them is left: pages
        that the system has to find first take as much CPU time as all the rest."""
        pages = next((pages for pages in self._idle if len(pages) >= num_bytes), None)
        if pages is None:
            pages = mmap.mmap(-1, max(mmap.PAGESIZE, num_bytes))
        else:
            self._idle.remove(pages)
        array = (ctypes.c_char * len(pages)).from_buffer(pages)
        weakref.finalize(array, self._give_back, pages).atexit = False
        return PickleBuffer(array).raw().toreadonly(), ctypes.addressof(array)

    def _give_back(self, pages: mmap.mmap) -> None:
        if len(pages) <= MAX_IDLE_BYTES:
            self._idle.append(pages)
            del self._idle[:-MAX_IDLE_BUFFERS]


def _read_in_threads(
    read_one: ReadOne, paths: Sequence[Path], max_bytes: Sequence[int]
) -> Generator[Contents]:
    """Reads in daemon threads, unlike an executor's: a read that hangs holds up no exit."""
    futures: list[Future[Contents]] = [Future() for _ in paths]
    tasks = iter(zip(futures, paths, max_bytes, strict=True))
    lock = threading.Lock()

    def work() -> None:
        never_interrupt()
        while True:
            with lock:
                task = next(tasks, None)
            if task is None:
                return
            future, path, size = task
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(memoryview(read_one(path, size)))
            except OSError as error:
                future.set_result(error)
            except MemoryError:  # or who waits for it would wait for ever
                future.set_result(OSError(errno.ENOMEM, os.strerror(errno.ENOMEM)))

    for _ in range(min(FILES_AT_A_TIME, len(futures))):
        threading.Thread(target=work, name="tier-read", daemon=True).start()
    try:
        for future in futures:
            yield future.result()
    finally:
        for future in futures:
            future.cancel()
