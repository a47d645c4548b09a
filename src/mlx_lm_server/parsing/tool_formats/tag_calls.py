"""Formats that write each argument between tags; its type comes from the tool's schema.

A value may hold the format's own marks, and models leave marks out. So a mark ends a value only
where what follows goes on as the format does:

    value </parameter> then <parameter= or </function>
    value, on a new line <parameter=key> where the tool has such an argument that is not there yet
    value, on a new line </function> then </tool_call> or the next call, or the end of the text
    value, on a new line </tool_call> then the next call, or the end of the text
"""

from __future__ import annotations

import html
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from mlx_lm_server.parsing.message import MessageBuilder
from mlx_lm_server.parsing.reader import Markers, Reader, Script, UnparsableError
from mlx_lm_server.parsing.tool_formats.arguments import ArgumentWriter
from mlx_lm_server.parsing.tool_formats.format import ToolFormat, ToolSchemas, dump

MAX_HEAD_CHARS = 512
ATTRIBUTE = re.compile(r"""\s+[\w:-]+\s*=\s*(?:"[^"]*"|'[^']*'|\S+)""")
CDATA = ("<![CDATA[", "]]>")


@dataclass(frozen=True)
class Tag:
    """`open` name `head_end` … `close`. A name may stand in quotes, with attributes after it."""

    open: str
    head_end: str
    close: str


@dataclass(frozen=True)
class TagCalls:
    """Calls as tags with a tag for each argument, within `blocks` or not.

    Where a call's head has no end, its name goes up to the next mark. `value_open` stands between
    an argument's head and its value. `pads`: a line break stands around each value, which is not
    part of it. `separator` may stand after the name of a call. `has_entities`: heads are escaped
    as in HTML.
    """

    call: Tag
    argument: Tag
    blocks: tuple[tuple[str, str], ...] = ()
    value_open: str = ""
    separator: str = ""
    pads: bool = False
    is_block_optional: bool = False
    has_cdata: bool = False
    has_entities: bool = False
    tokens: tuple[str, ...] = ()

    def format(self, name: str) -> ToolFormat:
        starts = tuple(begin for begin, _ in self.blocks)
        if self.is_block_optional or not self.blocks:
            starts = (*starts, self.call.open)
        marks = (*starts, *self._marks(), *self.tokens)
        return ToolFormat(name, self.read, starts=starts, marks=marks, write=self.write)

    def _marks(self) -> list[str]:
        tags = (self.call, self.argument)
        found = [mark for tag in tags for mark in (tag.open, tag.head_end, tag.close)]
        found += [mark for block in self.blocks for mark in block]
        return [mark for mark in (*found, self.value_open, self.separator) if len(mark) > 1]

    @property
    def block_ends(self) -> tuple[str, ...]:
        return tuple(end for _, end in self.blocks)

    @property
    def block_starts(self) -> tuple[str, ...]:
        return tuple(begin for begin, _ in self.blocks)

    def read(
        self, reader: Reader, out: MessageBuilder, schemas: ToolSchemas, start: str
    ) -> Script[None]:
        if start != self.call.open:
            yield from reader.skip_space()
            yield from reader.expect(self.call.open)
        while True:
            yield from self._call(reader, out, schemas)
            yield from reader.skip_space()
            if not (yield from reader.accept(self.call.open)):
                break
        yield from reader.accept(*self.block_ends)

    def _call(self, reader: Reader, out: MessageBuilder, schemas: ToolSchemas) -> Script[None]:
        name, _ = yield from self._head(reader, self.call)
        writer = ArgumentWriter(name, out, schemas)
        yield from reader.skip_space()
        if self.separator:
            yield from reader.accept(self.separator)
            yield from reader.skip_space()
        while (yield from reader.accept(self.argument.open)):
            yield from self._argument(reader, writer)
            yield from reader.skip_space()
        ends = (self.call.close, *self.block_ends, *self.block_starts, self.call.open)
        found = yield from reader.next_of(*ends)
        if found == self.call.close:
            reader.take(len(found))
        elif found is None and not reader.is_exhausted:
            raise UnparsableError(f"expected {self.argument.open}")
        writer.end()

    def _head(self, reader: Reader, tag: Tag) -> Script[tuple[str, str]]:
        """Returns a name and the attributes after it."""
        if not tag.head_end:
            return (yield from self._bare_name(reader)), ""
        while (end := re.search(f"{re.escape(tag.head_end)}|(?<=[^\\s])\n", reader.text)) is None:
            if len(reader.text) > MAX_HEAD_CHARS:
                raise UnparsableError(f"{tag.head_end} is missing")
            yield from reader.more()
        head = reader.take(end.start()).strip()
        reader.take(len(end[0]))
        if self.has_entities:
            head = html.unescape(head)
        attributes = ATTRIBUTE.search(head)
        name = head[: attributes.start()] if attributes else head
        return name.strip().strip("\"'"), head[len(name) :]

    def _bare_name(self, reader: Reader) -> Script[str]:
        """Returns a name that goes up to the next mark."""
        marks = (self.separator, self.argument.open, self.call.close, *self.block_ends)
        pattern = re.compile("|".join(re.escape(mark) for mark in marks if mark))
        while not (end := pattern.search(reader.text)):
            if len(reader.text) > MAX_HEAD_CHARS:
                raise UnparsableError("a call needs a name")
            yield from reader.more()
        name = reader.take(end.start()).strip()
        if not re.fullmatch(r"[\w.:/-]+", name):
            raise UnparsableError("a call needs a name")
        return name

    def _argument(self, reader: Reader, writer: ArgumentWriter) -> Script[None]:
        key, attributes = yield from self._head(reader, self.argument)
        if self.value_open:
            yield from reader.skip_space()
            yield from reader.expect(self.value_open)
        kinds = writer.kinds(key) or _told_kinds(attributes)
        value = _Value(self, reader, writer)
        if writer.holds_all(key):
            pieces: list[str] = []
            yield from value.read(pieces.append)
            writer.whole("".join(pieces))
            return
        writer.begin(key)
        if kinds == {"string"} and not self.has_cdata:
            writer.begin_text()
            yield from value.read(writer.text)
            writer.end_text()
            return
        parts: list[str] = []
        yield from value.read(parts.append)
        text = "".join(parts)
        if self.has_cdata and text.startswith(CDATA[0]) and text.endswith(CDATA[1]):
            text = text[len(CDATA[0]) : -len(CDATA[1])]
            kinds = kinds or frozenset(("string",))
        writer.value(key, text, kinds)

    def write(self, calls: Sequence[tuple[str, Mapping[str, Any]]]) -> str:
        return "\n".join(self._write(name, arguments) for name, arguments in calls)

    def _write(self, name: str, arguments: Mapping[str, Any]) -> str:
        pad = "\n" if self.pads else ""
        begin, end = next(iter(self.blocks), ("", ""))
        lines = [f"{self.call.open}{name}{self.call.head_end}{self.separator}"]
        for key, value in arguments.items():
            text = value if isinstance(value, str) else dump(value)
            head = f"{self.argument.open}{key}{self.argument.head_end}{self.value_open}"
            lines.append(f"{head}{pad}{text}{pad}{self.argument.close}")
        lines.append(self.call.close)
        return "\n".join([*filter(None, [begin]), *lines, *filter(None, [end])])


class _Value:
    """Reads one value up to what ends it, with the rules at the top of this module."""

    def __init__(self, style: TagCalls, reader: Reader, writer: ArgumentWriter) -> None:
        self._style = style
        self._reader = reader
        self._writer = writer
        self._after_call = (*style.block_ends, *style.block_starts, style.call.open)
        self._rules: dict[str, Callable[[str], bool | None]] = {
            style.argument.close: self._ends_argument,
            style.argument.open: self._begins_argument,
            style.call.close: self._ends_call,
        }
        for end in style.block_ends:
            self._rules.setdefault(end, self._ends_block)
        self._marks = _markers(tuple(self._rules))
        self._is_line_blank = True

    def read(self, emit: Callable[[str], None]) -> Script[None]:
        """Takes the value and the mark that ends it, where that is the argument's own. Raises
        EndOfTextError."""
        trimmed = _Padding(emit) if self._style.pads else emit
        reader = self._reader
        num_sure = 0  # letters that are part of the value although they look like a mark
        while True:
            found = self._marks.search(reader.text, num_sure)
            if found is None:
                held = self._marks.beginning_at_end(reader.text)
                piece = reader.take(max(len(reader.text) - held, num_sure))
                self._passed(piece)
                trimmed(piece)
                num_sure = 0
                yield from reader.more()
                continue
            ends = self._ends(found[0], reader.text[: found.start()], reader.text[found.end() :])
            if ends is None and not reader.is_at_end:
                yield
            elif ends is False:
                num_sure = found.start() + 1
            else:
                trimmed(reader.take(found.start()))
                if found[0] == self._style.argument.close:
                    reader.take(len(found[0]))
                return

    def _ends(self, mark: str, before: str, rest: str) -> bool | None:
        """Tells whether a mark ends the value; None where what follows is too short to say."""
        is_own = mark == self._style.argument.close
        return self._rules[mark](rest) if is_own or self._begins_line(before) else False

    def _begins_line(self, before: str) -> bool:
        """Tells whether only white space stands between the line's beginning and a place, before
        which the value goes on with a text that was not passed on yet."""
        _, line_break, line = before.rpartition("\n")
        return not line.strip() and (bool(line_break) or self._is_line_blank)

    def _passed(self, piece: str) -> None:
        self._is_line_blank = self._begins_line(piece)

    def _ends_argument(self, rest: str) -> bool | None:
        rest, style = rest.lstrip(), self._style
        if rest.startswith(style.call.close):
            return self._is_no_value(rest[len(style.call.close) :])
        return _goes_on(rest, (style.argument.open, style.call.close, *self._after_call))

    def _begins_argument(self, rest: str) -> bool | None:
        head, mark, _ = rest.partition(self._style.argument.head_end)
        if not mark:
            return None if len(head) < MAX_HEAD_CHARS else False
        return self._writer.expects(head.strip().strip("\"'"))

    def _ends_call(self, rest: str) -> bool | None:
        rest = rest.lstrip()
        for end in self._style.block_ends:
            if rest.startswith(end):
                return self._is_no_value(rest[len(end) :])
        return self._goes_on_or_ends(rest)

    def _ends_block(self, rest: str) -> bool | None:
        return self._goes_on_or_ends(rest.lstrip())

    def _goes_on_or_ends(self, rest: str) -> bool | None:
        if not rest and self._reader.is_at_end:
            return True
        return _goes_on(rest, self._after_call)

    def _is_no_value(self, rest: str) -> bool | None:
        """Anything may follow a call, but not the end of the value that it would be in."""
        rest, close = rest.lstrip(), self._style.argument.close
        if rest.startswith(close):
            return False
        return None if close.startswith(rest) and not self._reader.is_at_end else True


def _goes_on(rest: str, options: Sequence[str]) -> bool | None:
    """Tells whether a text begins with one of the options; None where it is too short to say."""
    if any(rest.startswith(option) for option in options):
        return True
    return None if any(option.startswith(rest) for option in options) else False


@lru_cache(maxsize=64)
def _markers(texts: tuple[str, ...]) -> Markers:
    return Markers(texts)


def _told_kinds(attributes: str) -> frozenset[str]:
    """Returns what an argument's own attributes say of its kind; empty where they do not."""
    if 'string="true"' in attributes:
        return frozenset(("string",))
    told = re.search(r'type="(\w+)"', attributes)
    return frozenset((told[1],)) if told else frozenset()


class _Padding:
    """Takes the line breaks off that stand around a value, while it comes."""

    def __init__(self, emit: Callable[[str], None]) -> None:
        self._emit = emit
        self._is_fresh = True
        self._held = ""

    def __call__(self, text: str) -> None:
        if not text:
            return
        if self._is_fresh:
            self._is_fresh = False
            text = text.removeprefix("\n")
        text = self._held + text
        self._held = "\n" if text.endswith("\n") else ""
        self._emit(text.removesuffix("\n"))
