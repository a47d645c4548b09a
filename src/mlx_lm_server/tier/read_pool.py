"""Reads several files at a time: one after the other leaves a fast medium idle."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue

from mlx_lm_server.tier.background import never_interrupt

Task = Callable[[], bytes]


class ReadPool:
    """Daemon threads, unlike those of an executor: a read that hangs holds up no exit. They start
    with the first read."""

    def __init__(self, num_threads: int) -> None:
        self._num_threads = num_threads
        self._threads: list[threading.Thread] = []
        self._tasks: SimpleQueue[tuple[Future[bytes], Task] | None] = SimpleQueue()

    def submit(self, task: Task) -> Future[bytes]:
        """What the task returns or raises; a cancelled one that was not begun is not done."""
        while len(self._threads) < self._num_threads:
            thread = threading.Thread(target=self._run, name="tier-read", daemon=True)
            self._threads.append(thread)
            thread.start()
        future: Future[bytes] = Future()
        self._tasks.put((future, task))
        return future

    def close(self) -> None:
        """Let the threads end after what was submitted."""
        for _ in self._threads:
            self._tasks.put(None)
        self._threads.clear()

    def _run(self) -> None:
        never_interrupt()
        while (item := self._tasks.get()) is not None:
            future, task = item
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(task())
            except Exception as error:  # noqa: BLE001 - the one who waits is told
                future.set_exception(error)
