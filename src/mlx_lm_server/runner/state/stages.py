"""Operations on slabs and pool, to be run one after the other between two forwards.

MLX decides when an operation is submitted whether it may write in place, and an operation under
way still holds what it reads. So what is read from an array must have ended before the array is
written; else the write copies all of it (docs/adr/0002). The graph of a forward is built before the
last one has ended, and so are these operations; each stage is waited for before the next begins,
and all of them before that forward is submitted.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence

import mlx.core as mx

# Copied in a millisecond or two.
SHORT_COPY_BYTES = 4 << 20


def ends_of(arrays: Iterable[mx.array]) -> list[mx.array]:
    """Who waits for these waits for the arrays as they are now, and holds nothing of them: empty
    slices depend on them all the same. A list of the arrays themselves would stand for whatever
    was written to them since."""
    return [(array if array.ndim else array[None])[:0] for array in arrays]


def unchanged(array: mx.array) -> mx.array:
    """The array as it is now, whatever is written to it later."""
    return array.reshape(array.shape)


class Stages:
    """Used on the engine's main thread only."""

    def __init__(self) -> None:
        self._stages: deque[tuple[list[mx.array], Callable[[], None] | None]] = deque()
        self._bytes_to_copy = 0
        self._has_operations = False

    def add(self, written: Sequence[mx.array], then: Callable[[], None] | None = None) -> None:
        """The operations that gave these arrays make a stage, after which `then` is called."""
        if written:
            self._stages.append((ends_of(written), then))
            self._has_operations = True

    def add_copy(self, copy: Callable[[], None], num_bytes: int) -> None:
        """`copy`, which copies so many bytes by itself, may hold arrays that later stages write in
        place: it is called when the stages before it have ended, and let go before the next is
        submitted."""
        self._stages.append(([], copy))
        self._bytes_to_copy += num_bytes

    @property
    def are_short(self) -> bool:
        """Whether they take no longer than telling tokens does."""
        return not self._has_operations and self._bytes_to_copy <= SHORT_COPY_BYTES

    @property
    def are_none(self) -> bool:
        """Returns whether there is nothing to do."""
        return not self._stages

    def start(self) -> None:
        """Submit the first stage already; only where nothing is under way."""
        if self._stages:
            mx.async_eval(self._stages[0][0])

    def run(self) -> None:
        while self._stages:
            ends, then = self._stages.popleft()
            mx.eval(ends)
            ends.clear()
            if then is not None:
                then()
        self._bytes_to_copy, self._has_operations = 0, False
