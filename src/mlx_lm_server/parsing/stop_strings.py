"""Ends a text at the first stop string, while the text is still arriving.

Invariants:
- what comes out is a prefix of what went in, and contains no stop string;
- what is held back is the longest suffix that could still begin one, and nothing else;
- however the text is cut into pieces, what comes out in all is the same.
"""

from __future__ import annotations

from collections.abc import Sequence


class StopStrings:
    """Of one sequence. `push` pieces until `is_stopped`; `flush` where the text ends by itself."""

    __slots__ = ("_held", "_stops", "is_stopped")

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.is_stopped = False

    def push(self, piece: str) -> str:
        """The text that is now certain to come before any stop string."""
        if not self._stops or self.is_stopped:
            return "" if self.is_stopped else piece
        text = self._held + piece
        start = self._first_stop(text)
        if start is not None:
            self.is_stopped = True
            self._held = ""
            return text[:start]
        cut = len(text) - self._longest_beginning(text)
        self._held = text[cut:]
        return text[:cut]

    def flush(self) -> str:
        """What is still held back, when no more text comes."""
        held, self._held = self._held, ""
        return held

    def _first_stop(self, text: str) -> int | None:
        """Where the text is cut: the stop string that is complete first wins, as if the text came
        letter by letter; of those that end together, the one that begins first."""
        found = [
            (start + len(stop), start) for stop in self._stops if (start := text.find(stop)) >= 0
        ]
        return min(found)[1] if found else None

    def _longest_beginning(self, text: str) -> int:
        """Length of the longest suffix of `text` that is a proper prefix of a stop string."""
        longest = min(len(text), max(map(len, self._stops)) - 1)
        for length in range(longest, 0, -1):
            suffix = text[-length:]
            if any(stop.startswith(suffix) for stop in self._stops):
                return length
        return 0
