"""Formats whose calls are JSON objects, `{"name": …, "arguments": {…}}`, in whatever marks."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mlx_lm_server.parsing.message import MessageBuilder
from mlx_lm_server.parsing.reader import (
    JsonScan,
    Reader,
    Script,
    UnparsableError,
)
from mlx_lm_server.parsing.tool_formats.format import (
    ToolFormat,
    ToolSchemas,
    dump,
    load,
    load_object,
)

NAME_KEYS = ("name", "tool_name", "function_name", "function", "tool")
ARGUMENT_KEYS = ("arguments", "parameters", "args", "input", "params", "tool_input")
# What else stands beside them and is no argument.
OTHER_KEYS = frozenset({"type", "id", "tool_call_id", "call_id", "index"})
CALL_KEYS = frozenset((*NAME_KEYS, *ARGUMENT_KEYS)) | OTHER_KEYS
_OTHERS = rf'(?:"(?:{"|".join(OTHER_KEYS)})"\s*:\s*(?:"[^"\\]*"|\d+)\s*,\s*)*'
# A call that begins like this can be streamed: its name is known before its arguments.
HEAD = re.compile(
    rf'\s*\{{\s*{_OTHERS}"(?:{"|".join(NAME_KEYS)})"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*{_OTHERS}'
    rf'"(?:{"|".join(ARGUMENT_KEYS)})"\s*:\s*(?=\{{)'
)
NAME_FIRST = re.compile(rf'\s*\{{\s*{_OTHERS}"(?:{"|".join(NAME_KEYS)})"\s*:\s*("(?:[^"\\]|\\.)*")')
FIRST_KEY = re.compile(r'\s*\{\s*"([^"]*)"')
FENCES = ("```json", "```")


@dataclass(frozen=True)
class JsonCalls:
    """Calls as JSON objects, one or several, in a list or not, between `starts` and `ends`, either
    of which may be missing. `name_key`, `argument_key` and `is_list` are for writing them."""

    starts: tuple[str, ...] = ()
    ends: tuple[str, ...] = ()
    bare: tuple[str, ...] = ()
    likely: tuple[str, ...] = ()
    dropped: tuple[str, ...] = ()
    name_key: str = "name"
    argument_key: str = "arguments"
    is_list: bool = False

    def format(self, name: str) -> ToolFormat:
        return ToolFormat(
            name,
            self.read,
            starts=self.starts,
            bare=self.bare,
            likely=self.likely,
            dropped=self.dropped,
            marks=(*self.starts, *self.ends, *self.dropped),
            write=self.write,
        )

    def read(
        self, reader: Reader, out: MessageBuilder, schemas: ToolSchemas, start: str
    ) -> Script[None]:
        is_list = start in self.likely and start.endswith("[")
        if start in self.likely and not is_list:
            reader.unread(start)
        yield from reader.skip_space()
        is_fenced = yield from reader.accept(*FENCES)
        yield from reader.skip_space()
        if not is_list:
            is_list = (yield from reader.accept("[")) is not None
        yield from reader.skip_space()
        yield from json_call(reader, out)
        yield from reader.skip_space()
        while (yield from self._has_more(reader)):
            yield from json_call(reader, out)
            yield from reader.skip_space()
        if is_list:
            yield from reader.accept("]")
            yield from reader.skip_space()
        if is_fenced:
            yield from reader.accept("```")
            yield from reader.skip_space()
        yield from reader.accept(*self.ends)

    def _has_more(self, reader: Reader) -> Script[bool]:
        """Another object follows, maybe after a separator or the mark that begins calls."""
        between = (",", ";", *(s for s in self.starts if not self.ends))
        found = yield from reader.accept(*between)
        if found is not None:
            yield from reader.skip_space()
        return (yield from reader.next_of("{")) is not None

    def write(self, calls: Sequence[tuple[str, Mapping[str, Any]]]) -> str:
        texts = [dump({self.name_key: n, self.argument_key: dict(a)}) for n, a in calls]
        start, end = next(iter(self.starts), ""), next(iter(self.ends), "")
        if self.is_list:
            return f"{start}[{', '.join(texts)}]{end}"
        return "\n".join(f"{start}\n{text}\n{end}" if start else text for text in texts)


def json_call(reader: Reader, out: MessageBuilder) -> Script[None]:
    """Reads `{"name": …, "arguments": {…}}`, passed on as it comes where the name is first."""
    scan, num_scanned, end = JsonScan(), 0, None
    is_named = False
    while not (head := HEAD.match(reader.text)):
        _check_beginning(reader.text)
        if not is_named and (name := NAME_FIRST.match(reader.text)):
            out.check_name(load(name[1]))
            is_named = True
        end = scan.feed(reader.text[num_scanned:])
        if end is not None:
            _whole_call((yield from reader.json_value(_ignore)), out)
            return
        num_scanned = len(reader.text)
        yield from reader.more()
    reader.take(head.end())
    out.begin_call(load(head[1]))
    yield from json_arguments(reader, out)
    yield from _rest_of_object(reader)


def json_arguments(reader: Reader, out: MessageBuilder) -> Script[None]:
    """Reads a JSON object, passed on as it comes, and ends the call."""
    load_object((yield from reader.json_value(out.arguments)))
    out.end_call()


def _check_beginning(text: str) -> None:
    first = FIRST_KEY.match(text)
    if first and first[1] not in CALL_KEYS:
        raise UnparsableError(f"{first[1]!r} is no key of a call")
    if text.strip() and not text.lstrip().startswith("{"):
        raise UnparsableError("no JSON object")


def _rest_of_object(reader: Reader) -> Script[None]:
    """Reads up to the object's last brace, which a model may also forget."""
    yield from reader.skip_space()
    while (yield from reader.next_of("}", ",")) == ",":
        reader.take(1)
        yield from reader.skip_space()
        if (yield from reader.next_of("{")):  # the brace is missing, and the next call follows
            reader.unread(",")
            return
        if not (yield from reader.next_of('"')):
            return
        yield from reader.json_value(_ignore, depth=1)
        return
    yield from reader.accept("}")


def _whole_call(text: str, out: MessageBuilder) -> None:
    call = load_object(text)
    function = call.get("function")
    if isinstance(function, dict):
        call = function
    name_key = next((key for key in NAME_KEYS if isinstance(call.get(key), str)), None)
    if name_key is None:
        raise UnparsableError("a call needs a name")
    out.call(call[name_key], dump(_arguments(call, name_key)))


def _arguments(call: dict[str, Any], name_key: str) -> dict[str, Any]:
    """Returns the arguments: an object, JSON text of one, or what stands beside the name."""
    key = next((key for key in ARGUMENT_KEYS if key in call and _may_be_all(call[key])), None)
    if key is None:
        if any(key in call for key in ARGUMENT_KEYS[:2]):
            raise UnparsableError("arguments are no object")
        return {k: v for k, v in call.items() if k != name_key and k not in OTHER_KEYS}
    arguments = call[key]
    if isinstance(arguments, str):
        return load_object(arguments)
    return arguments or {}


def _may_be_all(value: Any) -> bool:
    """Tells whether a value can be all arguments of a call, not just one with such a name."""
    if isinstance(value, str):
        return value.lstrip().startswith("{")
    return value is None or isinstance(value, dict)


def _ignore(_piece: str) -> None:
    pass
