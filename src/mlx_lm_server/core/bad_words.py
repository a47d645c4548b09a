"""Keeps a row from writing given sequences of tokens.

A function of the row's own tokens, as in `thinking.py`: the same whatever shares the batch, and
after a preemption. Only what the row has written counts, not its prompt.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence


class BadWords:
    """Keeps one row from completing words. Each has two tokens at least; its last one is
    `forbidden` where those before it have just come."""

    __slots__ = ("_last", "_longest", "_words", "forbidden")

    def __init__(self, words: Sequence[Sequence[int]], output_ids: Iterable[int] = ()) -> None:
        self._words = tuple((tuple(beginning), end) for *beginning, end in words)
        self._longest = max(len(beginning) for beginning, _ in self._words)
        self._last: tuple[int, ...] = tuple(output_ids)[-self._longest :]
        self.forbidden = self._ends()

    def push(self, token: int) -> None:
        self._last = (*self._last, token)[-self._longest :]
        self.forbidden = self._ends()

    def _ends(self) -> list[int]:
        last = self._last
        return [end for beginning, end in self._words if last[-len(beginning) :] == beginning]
