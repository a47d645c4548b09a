"""Values written as code: Python's literals, JSON's, and Gemma's, which has its own quotes."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from mlx_lm_server.parsing.reader import UnparsableError
from mlx_lm_server.parsing.tool_formats.format import load

MAX_DEPTH = 64
NAME = re.compile(r"[A-Za-z_][\w.\-]*")
BARE_TEXT = re.compile(r"[^,{}\[\]]+")
BARE_KEY = re.compile(r"[^\s:{}\[\],]+")
NUMBER = re.compile(r"[-+]?(?:\d[\d_]*\.?\d*|\.\d+)(?:[eE][-+]?\d+)?")
AFTER_NUMBER = re.compile(r"\s*[^\s,)\]}]")
WORDS = {"true": True, "false": False, "null": None, "True": True, "False": False, "None": None}
AFTER_ARGUMENT = re.compile(
    r"\s*(?:\Z|,\s*(?:\Z|[\w.\-]+\s*(?:=|\Z))|\)\s*(?:\Z|\]|,\s*[A-Za-z_]))"
)
SPACE = re.compile(r"\s*")
ESCAPES = {
    **{"n": "\n", "t": "\t", "r": "\r", "b": "\b", "f": "\f", "v": "\v", "a": "\a", "0": "\0"},
    **{"\\": "\\", "'": "'", '"': '"', "/": "/", "\n": ""},
}
CODE_POINT = re.compile(r"x([0-9a-fA-F]{2})|u([0-9a-fA-F]{4})|U([0-9a-fA-F]{8})")


class UnfinishedError(UnparsableError):
    """The text ends within a value."""


@dataclass(frozen=True)
class Dialect:
    """How values are written. `quotes` stand on both sides of a text. `is_raw`: a text that stands
    in no list and no object is written as it is, without escapes; then a quote ends it only where
    what follows can come after one. `has_bare_texts`: keys, and texts without a comma or bracket,
    may stand without quotes."""

    quotes: tuple[str, ...] = ('"""', "'''", '"', "'")
    is_raw: bool = False
    has_bare_texts: bool = False


class LiteralReader:
    """Reads one text from front to back; `place` is how far it is."""

    def __init__(self, text: str, dialect: Dialect) -> None:
        self.text = text
        self.place = 0
        self._dialect = dialect

    def skip_space(self) -> None:
        found = SPACE.match(self.text, self.place)
        assert found is not None
        self.place = found.end()

    def accept(self, mark: str) -> bool:
        """Takes a mark after white space, if it is there."""
        self.skip_space()
        if not self.text.startswith(mark, self.place):
            return False
        self.place += len(mark)
        return True

    def expect(self, mark: str) -> None:
        """Raises UnparsableError."""
        if not self.accept(mark):
            raise self._error(f"expected {mark}")

    def take(self, pattern: re.Pattern[str], what: str) -> str:
        """Takes what a pattern fits. Raises UnparsableError."""
        self.skip_space()
        found = pattern.match(self.text, self.place)
        if found is None:
            raise self._error(f"expected {what}")
        self.place = found.end()
        return found[0]

    def value(self, depth: int = MAX_DEPTH) -> Any:
        """Takes a value. Raises UnparsableError."""
        if depth == 0:
            raise UnparsableError("nested too deeply")
        self.skip_space()
        for quote in self._dialect.quotes:
            if self.text.startswith(quote, self.place):
                return self._text(quote, self._dialect.is_raw and depth == MAX_DEPTH)
        if self.accept("["):
            return self._items("]", depth)
        if self.accept("("):
            return self._items(")", depth)
        if self.accept("{"):
            return self.members(depth)
        return self._scalar()

    def members(self, depth: int = MAX_DEPTH) -> dict[str, Any]:
        """Takes what stands between the braces of an object, and the last brace."""
        found: dict[str, Any] = {}
        while not self.accept("}"):
            key = self._key(depth)
            self.expect(":")
            if key in found:
                raise UnparsableError(f"{key[:100]!r} is given twice")
            found[key] = self.value(depth - 1)
            if not self.accept(","):
                self.expect("}")
                break
        return found

    def _items(self, end: str, depth: int) -> list[Any]:
        found: list[Any] = []
        while not self.accept(end):
            found.append(self.value(depth - 1))
            if not self.accept(","):
                self.expect(end)
                break
        return found

    def _key(self, depth: int) -> str:
        self.skip_space()
        is_quoted = any(self.text.startswith(q, self.place) for q in self._dialect.quotes)
        if is_quoted or not self._dialect.has_bare_texts:
            key = self.value(depth - 1)
            return key if isinstance(key, str) else str(key)
        return self.take(BARE_KEY, "a key")

    def _scalar(self) -> Any:
        number = NUMBER.match(self.text, self.place)
        if number is not None and number.end() == len(self.text):
            raise UnfinishedError("the text ends within a number")
        if number is not None and not AFTER_NUMBER.match(self.text, number.end()):
            self.place = number.end()
            return _number(number[0])
        word = self.take(BARE_TEXT if self._dialect.has_bare_texts else NAME, "a value").strip()
        if self.place == len(self.text):
            raise UnfinishedError("the text ends within a word")
        if word in WORDS:
            return WORDS[word]
        if not self._dialect.has_bare_texts:
            raise UnparsableError("an argument is no literal")
        return word

    def _text(self, quote: str, is_raw: bool) -> str:
        """Takes a string and those that stand right behind it, which Python joins."""
        text = self._string(quote, is_raw)
        while not is_raw and not self._dialect.has_bare_texts:
            self.skip_space()
            quotes = (q for q in self._dialect.quotes if self.text.startswith(q, self.place))
            if (quote := next(quotes, "")) == "":
                break
            text += self._string(quote, is_raw)
        return text

    def _string(self, quote: str, is_raw: bool) -> str:
        begin = end = self.place + len(quote)
        has_escapes = not is_raw and quote[0] in "\"'"
        while (end := self.text.find(quote, end)) >= 0:
            is_inside = _is_escaped(self.text, end) if has_escapes else False
            if not is_inside and not (is_raw and not self._can_end(end + len(quote))):
                self.place = end + len(quote)
                text = self.text[begin:end]
                return _unescaped(text) if has_escapes else text
            end += 1
        self.place = len(self.text)
        raise UnfinishedError("the text ends within a string")

    def _can_end(self, place: int) -> bool:
        """Tells whether what stands at a place can come after an argument."""
        return AFTER_ARGUMENT.match(self.text, place) is not None

    def _error(self, message: str) -> UnparsableError:
        is_unfinished = self.place >= len(self.text) - 1  # a sign may begin a number
        return UnfinishedError(message) if is_unfinished else UnparsableError(message)


def _number(text: str) -> int | float:
    """Raises UnparsableError for what JSON cannot say."""
    text = text.replace("_", "").removeprefix("+")
    try:
        return int(text) if re.fullmatch(r"-?\d+", text) else float(load(repr(float(text))))
    except ValueError as error:
        raise UnparsableError(str(error)) from error


def _is_escaped(text: str, place: int) -> bool:
    num_slashes = 0
    while place - num_slashes > 0 and text[place - num_slashes - 1] == "\\":
        num_slashes += 1
    return num_slashes % 2 == 1


def _unescaped(text: str) -> str:
    """Returns a string's value; an escape that there is none of stays as it is, as in Python."""
    if "\\" not in text:
        return text
    parts: list[str] = []
    place = 0
    while (found := text.find("\\", place)) >= 0 and found + 1 < len(text):
        parts.append(text[place:found])
        piece, place = _escape_at(text, found + 1)
        parts.append(piece)
    parts.append(text[place:])
    return _joined_surrogates("".join(parts))


def _escape_at(text: str, place: int) -> tuple[str, int]:
    code = CODE_POINT.match(text, place)
    if code is not None:
        number = int(next(filter(None, code.groups())), 16)
        if number < 0x110000:
            return chr(number), code.end()
    letter = text[place]
    return ESCAPES.get(letter, "\\" + letter), place + 1


def _joined_surrogates(text: str) -> str:
    """Returns a text whose halves of characters, as JSON writes them, are joined. Raises
    UnparsableError for one that stands alone."""
    if not any(0xD800 <= ord(letter) < 0xE000 for letter in text):
        return text
    try:
        return text.encode("utf-16", "surrogatepass").decode("utf-16")
    except UnicodeDecodeError as error:
        raise UnparsableError("half of a character") from error
