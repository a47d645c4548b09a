"""Formats that write a tool's name in marks, and its arguments as a JSON object after it."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mlx_lm_server.parsing.message import MessageBuilder
from mlx_lm_server.parsing.reader import Markers, Reader, Script, UnparsableError
from mlx_lm_server.parsing.tool_formats.format import ToolFormat, ToolSchemas, dump
from mlx_lm_server.parsing.tool_formats.json_calls import json_arguments, json_call

MAX_NAME_CHARS = 256
# Reads what stands between the mark that begins a call and its arguments: its name, and its id
# where it has one.
ReadHead = Callable[[Reader], Script[tuple[str, str | None]]]


@dataclass(frozen=True)
class NamedCalls:
    """`open` name `middle` {arguments} `close`, one or several; `close` may be missing."""

    open: str
    middle: str
    close: str = ""

    def format(self, name: str) -> ToolFormat:
        return ToolFormat(
            name,
            self.read,
            starts=(self.open,),
            marks=(self.open, self.middle, self.close),
            write=self.write,
        )

    def read(
        self, reader: Reader, out: MessageBuilder, _schemas: ToolSchemas, start: str
    ) -> Script[None]:
        closes = (self.close,) if self.close else ()
        yield from read_calls(reader, out, start, self.open, self._head, closes, ())

    def _head(self, reader: Reader) -> Script[tuple[str, str | None]]:
        return (yield from name_until(reader, self.middle)), None

    def write(self, calls: Sequence[tuple[str, Mapping[str, Any]]]) -> str:
        texts = [f"{self.open}{n}{self.middle}{dump(dict(a))}{self.close}" for n, a in calls]
        return "".join(texts)


def read_calls(
    reader: Reader,
    out: MessageBuilder,
    start: str,
    begin: str,
    read_head: ReadHead,
    closes: Sequence[str],
    ends: Sequence[str],
) -> Script[None]:
    """Reads calls that each begin with a mark, which may be the `start` that was read. `closes` are
    marks that end a call, `ends` one of which ends all; any may be missing."""
    yield from reader.skip_space()
    if start != begin:
        yield from reader.expect(begin)
    while True:
        name, id = yield from read_head(reader)
        yield from reader.skip_space()
        out.begin_call(name, id)
        yield from json_arguments(reader, out)
        yield from reader.skip_space()
        for close in closes:
            yield from reader.accept(close)
            yield from reader.skip_space()
        if not (yield from reader.accept(begin)):
            break
    yield from reader.accept(*ends)


def name_until(reader: Reader, mark: str) -> Script[str]:
    """Returns what stands before a mark, which is taken too. Raises UnparsableError where that is
    too long for a name."""
    while (place := reader.text.find(mark)) < 0:
        if len(reader.text) > MAX_NAME_CHARS:
            raise UnparsableError("a call needs a name")
        yield from reader.more()
    name = reader.take(place)
    reader.take(len(mark))
    return name


TOOL_CALLS, ARGS, CALL_ID = "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"


def _mistral(
    reader: Reader, out: MessageBuilder, _schemas: ToolSchemas, _start: str
) -> Script[None]:
    """Reads `[TOOL_CALLS][{"name": …}, …]`, or since 2025 `[TOOL_CALLS]name[ARGS]{…}`."""
    yield from reader.skip_space()
    if (yield from reader.next_of("[{", "[ ", "[\n", "{")):
        yield from reader.accept("[")
        while True:
            yield from reader.skip_space()
            yield from json_call(reader, out)
            yield from reader.skip_space()
            if not (yield from reader.accept(",")):
                yield from reader.accept("]")
                return
    while not (head := re.search(r"\[CALL_ID\]|\[ARGS\]|\{", reader.text)):
        if len(reader.text) > MAX_NAME_CHARS:
            raise UnparsableError("a call needs a name")
        if reader.is_at_end and re.fullmatch(r"[\w.\-]+\s*", reader.text):
            out.call(reader.take(len(reader.text)), "{}")
            return
        yield from reader.more()
    name, id = reader.take(head.start()), None
    if (yield from reader.accept(CALL_ID)):
        id = yield from name_until(reader, ARGS)
    else:
        yield from reader.accept(ARGS)
    yield from reader.skip_space()
    out.begin_call(name, id)
    yield from json_arguments(reader, out)


SEPARATOR = "<｜tool▁sep｜>"
CALL_BEGIN, CALL_END = "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>"
CALLS_BEGIN, CALLS_END = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"


def _deepseek(
    reader: Reader, out: MessageBuilder, _schemas: ToolSchemas, start: str
) -> Script[None]:
    """Reads V3's and R1's `function<sep>name ```json {…} ```​` and V3.1's `name<sep>{…}`."""
    closes = ("```", CALL_END)
    yield from read_calls(reader, out, start, CALL_BEGIN, _deepseek_head, closes, (CALLS_END,))


def _deepseek_head(reader: Reader) -> Script[tuple[str, str | None]]:
    name = yield from name_until(reader, SEPARATOR)
    yield from reader.skip_space()
    if (yield from reader.next_of("{")) is None:
        name = yield from name_until(reader, "```json")
    return name, None


KIMI_BEGIN, KIMI_END = "<|tool_call_begin|>", "<|tool_call_end|>"
KIMI_ARGUMENTS = "<|tool_call_argument_begin|>"
KIMI_SECTIONS = (
    ("<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"),
    ("<|tool_call_section_begin|>", "<|tool_call_section_end|>"),
)


def _kimi(reader: Reader, out: MessageBuilder, _schemas: ToolSchemas, start: str) -> Script[None]:
    """Reads `<|tool_call_begin|>functions.name:0<|tool_call_argument_begin|>{…}`, within a section
    or without one."""
    ends = [end for _, end in KIMI_SECTIONS]
    yield from read_calls(reader, out, start, KIMI_BEGIN, _kimi_head, (KIMI_END,), ends)


def _kimi_head(reader: Reader) -> Script[tuple[str, str | None]]:
    id = (yield from name_until(reader, KIMI_ARGUMENTS)).strip()
    name, _, number = id.rpartition(":")
    return (name if name and number.isdecimal() else id), id


SOLAR_BEGIN, SOLAR_NAME = "<|tool_call:begin|>", "<|tool_call:name|>"
SOLAR_ARGUMENTS, SOLAR_END = "<|tool_call:args|>", "<|tool_call:end|>"


def _solar(reader: Reader, out: MessageBuilder, _schemas: ToolSchemas, start: str) -> Script[None]:
    """Reads `<|tool_call:begin|>id<|tool_call:name|>name<|tool_call:args|>{…}<|tool_call:end|>`."""
    closes, ends = (SOLAR_END,), ("<|calls|>",)
    yield from read_calls(reader, out, start, SOLAR_BEGIN, _solar_head, closes, ends)


def _solar_head(reader: Reader) -> Script[tuple[str, str | None]]:
    id = (yield from name_until(reader, SOLAR_NAME)).strip()
    return (yield from name_until(reader, SOLAR_ARGUMENTS)), id


RECIPIENT = ">>>"
RECIPIENTS = Markers((RECIPIENT,))


def _functionary(
    reader: Reader, out: MessageBuilder, _schemas: ToolSchemas, _start: str
) -> Script[None]:
    """Reads `>>>name` and arguments on the next line; what `>>>all` begins is content."""
    while True:
        name = (yield from name_until(reader, "\n")).strip()
        if name == "all":
            found = yield from reader.pass_until(RECIPIENTS, out.content)
        else:
            yield from reader.skip_space()
            out.begin_call(name)
            yield from json_arguments(reader, out)
            yield from reader.skip_space()
            found = yield from reader.accept(RECIPIENT)
        if found is None:
            return


def _keyed(reader: Reader, out: MessageBuilder, _schemas: ToolSchemas, _start: str) -> Script[None]:
    """Reads Apertus' `[{"name": {…}}, …]`: the name is the key of each object."""
    yield from reader.skip_space()
    yield from reader.expect("[")
    while True:
        yield from reader.skip_space()
        while not (head := re.match(r'\{\s*"([^"\\]+)"\s*:\s*(?=\{)', reader.text)):
            if not re.match(r'\{\s*(?:"[^"\\]*(?:"\s*(?::\s*)?)?)?\Z', reader.text):
                raise UnparsableError("a call needs a name and an object of arguments")
            yield from reader.more()
        reader.take(head.end())
        out.begin_call(head[1])
        yield from json_arguments(reader, out)
        yield from reader.skip_space()
        yield from reader.accept("}")
        yield from reader.skip_space()
        if not (yield from reader.accept(",")):
            break
    yield from reader.accept("]")
    yield from reader.skip_space()
    yield from reader.accept("<|tools_suffix|>")


FORMATS = (
    ToolFormat(
        "mistral", _mistral, starts=(TOOL_CALLS,), marks=(TOOL_CALLS, ARGS, CALL_ID), id_letters=9
    ),
    ToolFormat(
        "deepseek",
        _deepseek,
        starts=(CALLS_BEGIN, CALL_BEGIN),
        marks=(CALLS_BEGIN, CALLS_END, CALL_BEGIN, CALL_END, SEPARATOR),
    ),
    ToolFormat(
        "kimi_k2",
        _kimi,
        starts=(*(begin for begin, _ in KIMI_SECTIONS), KIMI_BEGIN),
        marks=(*sum(KIMI_SECTIONS, ()), KIMI_BEGIN, KIMI_ARGUMENTS, KIMI_END),
    ),
    ToolFormat(
        "solar",
        _solar,
        starts=("<|tool_calls|>", SOLAR_BEGIN),
        marks=(
            *("<|tool_calls|>", "<|calls|>"),
            *(SOLAR_BEGIN, SOLAR_NAME, SOLAR_ARGUMENTS, SOLAR_END),
        ),
    ),
    NamedCalls("<function=", ">", "</function>").format("functionary_v31"),
    ToolFormat("functionary_v32", _functionary, starts=(RECIPIENT,), marks=(RECIPIENT,)),
    ToolFormat(
        "apertus",
        _keyed,
        starts=("<|tools_prefix|>",),
        marks=("<|tools_prefix|>", "<|tools_suffix|>"),
    ),
)
