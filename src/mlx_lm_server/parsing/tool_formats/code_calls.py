"""Formats that write a call as code: Python's, and Gemma's. A call is known when it is complete."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from mlx_lm_server.parsing.message import MessageBuilder
from mlx_lm_server.parsing.reader import Reader, Script, UnparsableError
from mlx_lm_server.parsing.tool_formats.arguments import value_of
from mlx_lm_server.parsing.tool_formats.format import ToolFormat, ToolSchemas, dump, load
from mlx_lm_server.parsing.tool_formats.literals import (
    Dialect,
    LiteralReader,
    UnfinishedError,
)

T = TypeVar("T")
Call = tuple[str, dict[str, Any]]
# What a list of calls looks like from its first letters on.
CALL = r"(?:[A-Za-z_][\w.\-]*\s*(?:\(.*)?)?\Z"
LIST_OF_CALLS = re.compile(rf"\s*\[\s*{CALL}", re.DOTALL)
LIST_OR_LINE = re.compile(rf"\s*\[?\s*{CALL}", re.DOTALL)
FUNCTION = re.compile(r"[A-Za-z_][\w.\-]*")
PYTHON = Dialect()
GEMMA_CALL = re.compile(r"\s*(?:(?:call)?:.*|c?|ca|cal|call)\Z", re.DOTALL)
FENCES = ("```python", "```")
BRACKET = re.compile(r"[\])}>]")
# A text longer than this is not parsed at every bracket, but where it may be at its end or has
# grown by a share, so that the work stays in proportion to its length.
SHORT_CHARS = 2048
SHARE = 16


@dataclass(frozen=True)
class PythonCalls:
    """Calls as Python writes them, `[f(a=1), g(b="x")]`, or each on a line of its own; the list may
    stand between `starts` and `ends`. Any words may name arguments, and texts may hold line
    breaks, which Python itself does not allow."""

    starts: tuple[str, ...] = ()
    ends: tuple[str, ...] = ()
    bare: tuple[str, ...] = ("[",)
    dialect: Dialect = PYTHON

    def format(self, name: str) -> ToolFormat:
        return ToolFormat(
            name,
            self.read,
            starts=self.starts,
            bare=self.bare,
            marks=(*self.starts, *self.ends),
            write=self.write,
        )

    def read(
        self, reader: Reader, out: MessageBuilder, schemas: ToolSchemas, start: str
    ) -> Script[None]:
        yield from reader.skip_space()
        if start:
            yield from reader.accept(*FENCES)
        beginning = LIST_OR_LINE if start else LIST_OF_CALLS
        calls = yield from _complete(reader, self._calls, beginning, (")]", *self.ends))
        if self.dialect.is_raw and start and not (yield from self._is_at_end(reader)):
            raise UnparsableError(f"expected {self.ends[0]}")
        for name, arguments in calls:
            function = schemas.resolve(name)
            out.call(function, dump(_typed(function, arguments, schemas)))
        yield from reader.skip_space()
        if start:
            yield from reader.accept("```")
            yield from reader.skip_space()
        yield from reader.accept(*self.ends)

    def _is_at_end(self, reader: Reader) -> Script[bool]:
        yield from reader.skip_space()
        return reader.is_exhausted or (yield from reader.next_of("```", *self.ends)) is not None

    def _calls(self, text: str, is_at_end: bool) -> tuple[list[Call], int]:
        reader = LiteralReader(text, self.dialect)
        is_list = reader.accept("[")
        calls = [_call(reader)]
        while self._has_more(reader, is_list=is_list):
            calls.append(_call(reader))
        if is_list:
            reader.expect("]")
        elif not is_at_end and not any(end in text[reader.place :] for end in self.ends):
            raise UnfinishedError("another call may follow")
        return calls, reader.place

    def _has_more(self, reader: LiteralReader, *, is_list: bool) -> bool:
        if reader.accept(","):
            return not reader.text.startswith("]", reader.place)
        reader.skip_space()
        return not is_list and FUNCTION.match(reader.text, reader.place) is not None

    def write(self, calls: Sequence[tuple[str, Mapping[str, Any]]]) -> str:
        texts = [
            f"{name}({', '.join(f'{key}={value!r}' for key, value in arguments.items())})"
            for name, arguments in calls
        ]
        start, end = next(iter(self.starts), ""), next(iter(self.ends), "")
        return f"{start}[{', '.join(texts)}]{end}"


def _call(reader: LiteralReader) -> Call:
    name = reader.take(FUNCTION, "a name")
    reader.expect("(")
    arguments: dict[str, Any] = {}
    while not reader.accept(")"):
        key = reader.take(FUNCTION, "a named argument")
        reader.expect("=")
        if key in arguments:
            raise UnparsableError(f"{key[:100]!r} is given twice")
        arguments[key] = reader.value()
        if not reader.accept(","):
            reader.expect(")")
            break
    return name, arguments


def _complete(
    reader: Reader,
    parse: Callable[[str, bool], tuple[T, int]],
    beginning: re.Pattern[str],
    ends: Sequence[str],
) -> Script[T]:
    """Returns what `parse` makes of the text once it is complete. `parse` is asked where a bracket
    has come, is told whether the text is at its end, and tells how much of it it read. Raises
    UnparsableError as soon as the text is no `beginning` of anything."""
    num_seen = num_tried = 0
    longest_end = max(map(len, ends))
    while True:
        text, num_new = reader.text, num_seen
        if num_new < SHORT_CHARS and not beginning.match(text):
            raise UnparsableError("no calls")
        num_seen = len(text)
        may_end = any(text.find(end, max(num_new - longest_end, 0)) >= 0 for end in ends)
        has_grown = num_seen - num_tried >= (num_tried // SHARE if num_seen > SHORT_CHARS else 1)
        if reader.is_at_end or may_end or (has_grown and BRACKET.search(text, num_new)):
            num_tried = num_seen
            try:
                value, place = parse(reader.text, reader.is_at_end)
            except UnfinishedError:
                yield from reader.more()
                continue
            reader.take(place)
            return value
        yield from reader.more()


def _typed(function: str, arguments: dict[str, Any], schemas: ToolSchemas) -> dict[str, Any]:
    """Returns the arguments with texts that stand for values of other kinds as such values."""
    found = {}
    for key, value in arguments.items():
        kinds = schemas.kinds(function, key)
        is_text = not kinds or "string" in kinds or not isinstance(value, str)
        found[key] = value if is_text else value_of(value, kinds, key)
    return found


@dataclass(frozen=True)
class GemmaCalls:
    """Calls as `call:name{key:<quote>text<quote>,other:1}` between `start` and `end`: JSON with
    bare keys and odd quotes."""

    start: str
    end: str
    quote: str

    def format(self, name: str) -> ToolFormat:
        marks = (self.start, self.end, self.quote)
        return ToolFormat(name, self.read, starts=(self.start,), marks=marks, write=self.write)

    def read(
        self, reader: Reader, out: MessageBuilder, schemas: ToolSchemas, _start: str
    ) -> Script[None]:
        name, arguments = yield from _complete(reader, self._call, GEMMA_CALL, (self.end,))
        function = schemas.resolve(name)
        out.call(function, dump(_typed(function, arguments, schemas)))
        yield from reader.skip_space()
        yield from reader.accept(self.end)

    def _call(self, text: str, _is_at_end: bool) -> tuple[Call, int]:
        reader = LiteralReader(text, Dialect((self.quote, '"'), has_bare_texts=True))
        reader.accept("call")
        reader.expect(":")
        name = reader.take(FUNCTION, "a name")
        reader.expect("{")
        return (name, load(dump(reader.members()))), reader.place

    def write(self, calls: Sequence[tuple[str, Mapping[str, Any]]]) -> str:
        return "".join(
            f"{self.start}call:{name}{self._written(dict(arguments))}{self.end}"
            for name, arguments in calls
        )

    def _written(self, value: Any) -> str:
        if isinstance(value, str):
            return f"{self.quote}{value}{self.quote}"
        if isinstance(value, list):
            return f"[{','.join(map(self._written, value))}]"
        if isinstance(value, dict):
            return f"{{{','.join(f'{k}:{self._written(v)}' for k, v in value.items())}}}"
        return dump(value)
