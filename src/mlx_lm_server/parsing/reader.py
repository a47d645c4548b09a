"""Text that is still arriving, read by scripts.

A script is a generator that reads a text from front to back and yields where it needs more of it;
so a format of nested parts is written down in the order in which its parts come. What a script
does depends on the text alone, never on how it was cut into pieces.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Generator, Sequence
from typing import TypeVar

T = TypeVar("T")
Script = Generator[None, None, T]
Emit = Callable[[str], None]

OUTSIDE_STRINGS = re.compile(r"[ \t\r\n,:0-9+\-.eEtrufalsn]*")
WITHIN_STRINGS = re.compile(r'["\\\x00-\x1f]')


class UnparsableError(Exception):
    """The text is not what the format says."""


class EndOfTextError(UnparsableError):
    """The text ended where the format goes on."""


class Markers:
    """Strings to look for; none may begin with another of them."""

    __slots__ = ("_first_letters", "_longest", "_pattern", "_texts")

    def __init__(self, texts: Sequence[str]) -> None:
        self._texts = tuple(dict.fromkeys(texts))
        self._pattern = re.compile("|".join(map(re.escape, self._texts)))
        self._first_letters = tuple({text[0] for text in self._texts})
        self._longest = max(map(len, self._texts))

    def search(self, text: str, begin: int = 0) -> re.Match[str] | None:
        return self._pattern.search(text, begin)

    def may_be_in(self, text: str) -> bool:
        return any(letter in text for letter in self._first_letters)

    def beginning_at_end(self, text: str) -> int:
        """Length of the longest suffix that could go on to be one of them."""
        for length in range(min(len(text), self._longest - 1), 0, -1):
            suffix = text[-length:]
            if any(marker.startswith(suffix) for marker in self._texts):
                return length
        return 0


class JsonScan:
    """Finds the end of a JSON value (object, array or string) that comes in pieces. `depth` 1
    begins within an object. Control characters that a model left bare in a string are noted in
    `bare`; `num_good` letters came before what cannot be JSON."""

    __slots__ = ("_depth", "_is_escaped", "_is_in_string", "bare", "num_good")

    def __init__(self, depth: int = 0) -> None:
        self._depth = depth
        self._is_in_string = False
        self._is_escaped = False
        self.bare: list[int] = []
        self.num_good = 0

    def feed(self, piece: str) -> int | None:
        """Returns where in the piece the value ends; None where it goes on. Raises
        UnparsableError."""
        self.bare = []
        place = 0
        while place < len(piece):
            if self._is_in_string:
                place = self._pass_string(piece, place)
                if self._is_at_end:
                    return place
                continue
            place = OUTSIDE_STRINGS.match(piece, place).end()  # type: ignore[union-attr]
            if place == len(piece):
                break
            letter = piece[place]
            place += 1
            if letter == '"':
                self._is_in_string = True
            elif letter in "{[":
                self._depth += 1
            elif letter in "}]":
                self._depth -= 1
                if self._depth <= 0:
                    return place
            else:
                self.num_good = place - 1
                raise UnparsableError(f"{letter!r} outside a string")
        return None

    @property
    def _is_at_end(self) -> bool:
        return self._depth == 0 and not self._is_in_string

    def _pass_string(self, piece: str, place: int) -> int:
        """Returns the place after the string, or the end of the piece."""
        if self._is_escaped:
            self._is_escaped = False
            place += 1
        while (found := WITHIN_STRINGS.search(piece, place)) is not None:
            letter, place = found[0], found.end()
            if letter == '"':
                self._is_in_string = False
                return place
            if letter != "\\":
                self.bare.append(place - 1)
            elif place == len(piece):
                self._is_escaped = True
            else:
                place += 1
        return len(piece)


def _escape(piece: str, places: Sequence[int]) -> str:
    if not places:
        return piece
    letters = list(piece)
    for place in places:
        if place < len(letters):
            letters[place] = f"\\u{ord(letters[place]):04x}"
    return "".join(letters)


class Reader:
    """The text that has come and is not read yet. Its generators are parts of scripts."""

    __slots__ = ("_begins", "_taken", "is_at_end", "text")

    def __init__(self) -> None:
        self.text = ""
        self.is_at_end = False
        self._taken: list[str] = []
        self._begins: list[int] = []

    @property
    def is_exhausted(self) -> bool:
        return self.is_at_end and not self.text

    def take(self, count: int) -> str:
        piece, self.text = self.text[:count], self.text[count:]
        if self._begins:
            self._taken.append(piece)
        return piece

    def remember(self, text: str) -> None:
        """Keeps what is read from here on; `text` was read just before. Within what is remembered,
        more can be remembered."""
        if self._begins:
            self._begins.append(len(self._taken) - bool(text))
        else:
            self._begins.append(0)
            self._taken.append(text)

    def recall(self) -> str:
        """Returns what was read since the last `remember`, which ends."""
        begin = self._begins.pop()
        text = "".join(self._taken[begin:])
        if not self._begins:
            self._taken.clear()
        return text

    def recall_all(self) -> str:
        """Returns what was read since the first `remember`; all of them end."""
        del self._begins[1:]
        return self.recall() if self._begins else ""

    def unread(self, text: str) -> None:
        """Puts text back that was read last; within what is remembered it counts as read again."""
        while self._taken and self._taken[-1] in ("", text):
            if self._taken.pop() == text:
                break
        self.text = text + self.text

    def more(self) -> Script[None]:
        """Waits for more text. Raises EndOfTextError where none comes."""
        if self.is_at_end:
            raise EndOfTextError("the text ends too early")
        yield

    def pass_until(self, markers: Markers, emit: Emit) -> Script[str | None]:
        """Emit what comes before the first marker, take the marker and return it; None where the
        text ends without one."""
        while True:
            if markers.may_be_in(self.text):
                found = markers.search(self.text)
                if found:
                    emit(self.take(found.start()))
                    return self.take(len(found[0]))
                held = 0 if self.is_at_end else markers.beginning_at_end(self.text)
                if len(self.text) > held:
                    emit(self.take(len(self.text) - held))
            elif self.text:
                emit(self.take(len(self.text)))
            if self.is_at_end:
                return None
            yield

    def until(self, marker: str) -> Script[str]:
        """The text before a marker, which is taken too. Raises EndOfTextError."""
        while (place := self.text.find(marker)) < 0:
            yield from self.more()
        text = self.take(place)
        self.take(len(marker))
        return text

    def skip_space(self) -> Script[None]:
        """Ends at a letter or at the end of the text."""
        while True:
            self.take(len(self.text) - len(self.text.lstrip()))
            if self.text or self.is_at_end:
                return
            yield

    def next_of(self, *options: str) -> Script[str | None]:
        """Returns the longest of them that the text goes on with, if any; nothing is taken."""
        while True:
            text = self.text
            is_open = any(len(option) > len(text) and option.startswith(text) for option in options)
            if self.is_at_end or not is_open:
                fitting = [option for option in options if text.startswith(option)]
                return max(fitting, key=len, default=None)
            yield

    def accept(self, *options: str) -> Script[str | None]:
        """The same, and what is found is taken."""
        found = yield from self.next_of(*options)
        if found is not None:
            self.take(len(found))
        return found

    def expect(self, *options: str) -> Script[str]:
        """Raises UnparsableError."""
        found = yield from self.accept(*options)
        if found is None:
            raise UnparsableError(f"expected {options[0]}")
        return found

    def json_value(self, emit: Emit, depth: int = 0) -> Script[str]:
        """An object, array or string as it comes, valid as far as brackets go."""
        scan, pieces = JsonScan(depth), []
        while True:
            try:
                end = scan.feed(self.text)
            except UnparsableError:
                emit(_escape(self.take(scan.num_good), scan.bare))
                raise
            raw = self.take(len(self.text) if end is None else end)
            pieces.append(_escape(raw, scan.bare))
            if pieces[-1]:
                emit(pieces[-1])
            if end is not None:
                return "".join(pieces)
            yield from self.more()
