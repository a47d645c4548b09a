"""Who may come in: a bound on what is in work and queued, and an honest time to come back."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from mlx_lm_server.config import Config
from mlx_lm_server.errors import EngineUnavailableError, InvalidRequestError, OverloadedError

# Completions that the measured pace looks back on, and how far Retry-After goes.
NUM_MEASURED = 32
MAX_RETRY_AFTER_S = 60.0


class Admission:
    """Counts sequences, on the event loop. A sequence holds its place from `preparing` until the
    engine has ended it."""

    def __init__(
        self, config: Config, *, num_live: Callable[[], int], clock: Callable[[], float]
    ) -> None:
        room = config.batching.max_batch_size + config.batching.max_queue_size
        limit = config.admission.max_concurrent_requests
        self.max_live = min(room, limit) if limit else room
        self.is_draining = False
        self._num_live = num_live
        self._clock = clock
        self._num_preparing = 0
        self._ends_s: deque[float] = deque(maxlen=NUM_MEASURED)

    @property
    def num_open(self) -> int:
        """Sequences that hold a place."""
        return self._num_preparing + self._num_live()

    @property
    def is_full(self) -> bool:
        return self.num_open >= self.max_live

    @contextmanager
    def preparing(self, num_sequences: int) -> Iterator[None]:
        """Holds places while a request is tokenised and submitted.

        Raises OverloadedError, EngineUnavailableError (draining), or InvalidRequestError for more
        sequences than will ever fit.
        """
        if self.is_draining:
            raise EngineUnavailableError("the server is shutting down")
        if num_sequences > self.max_live:
            raise InvalidRequestError(
                f"{num_sequences} prompts in one request; the limit is {self.max_live}",
                param="prompt",
            )
        if self.num_open + num_sequences > self.max_live:
            raise OverloadedError(
                f"{self.num_open} requests are in work or queued, the limit is {self.max_live}",
                retry_after_s=self.retry_after_s(),
                code="queue_full",
            )
        self._num_preparing += num_sequences
        try:
            yield
        finally:
            self._num_preparing -= num_sequences

    def observe_end(self) -> None:
        """A sequence gave its place back."""
        self._ends_s.append(self._clock())

    def retry_after_s(self) -> float:
        """When the next place should be free: the time between the latest ends. At least 1 s."""
        if len(self._ends_s) < 2:
            return 5.0
        pace_s = (self._clock() - self._ends_s[0]) / len(self._ends_s)
        return float(min(max(math.ceil(pace_s), 1.0), MAX_RETRY_AFTER_S))
