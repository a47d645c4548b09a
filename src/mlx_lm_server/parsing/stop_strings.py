"""Ends a text at the first stop string, while the text is still arriving.

Invariants:
- what comes out is a prefix of what went in, and contains no stop string, but for the one at its
  end where that is kept;
- what is held back is the longest suffix that could still begin one, and nothing else;
- however the text is cut into pieces, what comes out in all is the same.
"""

from __future__ import annotations

from collections.abc import Sequence


class StopStrings:
    """Looks for stop strings in one sequence. `push` pieces until `is_stopped`; `flush` where the
    text ends by itself. `found` is the stop string that ended it, which stays in the text where
    `keeps_stop`. `num_held` letters are held back, or, once it is stopped, cut off."""

    __slots__ = ("_held", "_keeps_stop", "_stops", "found", "num_held")

    def __init__(self, stops: Sequence[str], *, keeps_stop: bool = False) -> None:
        self._stops = tuple(stops)
        self._keeps_stop = keeps_stop
        self._held = ""
        self.found: str | None = None
        self.num_held = 0

    @property
    def is_stopped(self) -> bool:
        return self.found is not None

    def push(self, piece: str) -> str:
        """The text that is now certain to come before any stop string."""
        if not self._stops or self.is_stopped:
            return "" if self.is_stopped else piece
        text = self._held + piece
        found = self._first_stop(text)
        if found is not None:
            start, self.found = found
            cut = start + len(self.found) if self._keeps_stop else start
            self._held = ""
            self.num_held = len(text) - cut
            return text[:cut]
        cut = len(text) - self._longest_beginning(text)
        self._held = text[cut:]
        self.num_held = len(self._held)
        return text[:cut]

    def flush(self) -> str:
        """What is still held back, when no more text comes."""
        held, self._held = self._held, ""
        if not self.is_stopped:
            self.num_held = 0
        return held

    def _first_stop(self, text: str) -> tuple[int, str] | None:
        """Where it begins, and which: the stop string that is complete first wins, as if the text
        came letter by letter; of those that end together, the one that begins first."""
        found = [
            (start + len(stop), start, stop)
            for stop in self._stops
            if (start := text.find(stop)) >= 0
        ]
        return min(found)[1:] if found else None

    def _longest_beginning(self, text: str) -> int:
        """Length of the longest suffix of `text` that is a proper prefix of a stop string."""
        longest = min(len(text), max(map(len, self._stops)) - 1)
        for length in range(longest, 0, -1):
            suffix = text[-length:]
            if any(stop.startswith(suffix) for stop in self._stops):
                return length
        return 0
