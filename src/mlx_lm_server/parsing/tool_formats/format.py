"""What all formats of tool calls share."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mlx_lm_server.parsing.message import MessageBuilder
from mlx_lm_server.parsing.reader import (
    Emit,
    EndOfTextError,
    JsonScan,
    Markers,
    Reader,
    Script,
    UnparsableError,
)
from mlx_lm_server.parsing.strict_schema import StrictSchema

# A call that begins like this can be streamed: its name is known before its arguments.
HEAD = re.compile(
    r'\s*\{\s*(?:"type"\s*:\s*"function"\s*,\s*)?"(?:name|function)"\s*:\s*("(?:[^"\\]|\\.)*")'
    r'\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\{)'
)
FIRST_KEY = re.compile(r'\s*\{\s*"([^"]*)"')
CALL_KEYS = frozenset({"name", "arguments", "parameters", "type", "function", "id"})


class ToolSchemas:
    """The types of the arguments of the tools in one request."""

    def __init__(self, tools: Sequence[Mapping[str, Any]]) -> None:
        functions = [tool.get("function", {}) for tool in tools]
        self._parameters = {f.get("name"): f.get("parameters") or {} for f in functions}
        self.strict = {
            str(f.get("name")): StrictSchema(f.get("parameters") or {})
            for f in functions
            if f.get("strict")
        }

    def kinds(self, function: str, argument: str) -> frozenset[str]:
        """JSON types that the argument may have; empty where that is not known."""
        properties = self._parameters.get(function, {}).get("properties")
        schema = properties.get(argument) if isinstance(properties, dict) else None
        return frozenset(_kinds(schema)) if isinstance(schema, dict) else frozenset()


def _kinds(schema: Mapping[str, Any]) -> list[str]:
    kind = schema.get("type")
    if isinstance(kind, str):
        return [kind]
    if isinstance(kind, list):
        return [k for k in kind if isinstance(k, str)]
    if isinstance(values := schema.get("enum"), list) and all(isinstance(v, str) for v in values):
        return ["string"]
    options = schema.get("anyOf") or schema.get("oneOf")
    if not isinstance(options, list):
        return []
    return [kind for option in options if isinstance(option, dict) for kind in _kinds(option)]


ReadCalls = Callable[[Reader, MessageBuilder, ToolSchemas], Script[None]]


@dataclass(frozen=True)
class ToolFormat:
    """`starts` begin a block of calls, `bare` is the letter that may begin one at the start of an
    answer. `tokens` are all markers that may be special tokens. `read` begins after the start."""

    name: str
    read: ReadCalls
    starts: tuple[str, ...] = ()
    bare: str = ""
    tokens: tuple[str, ...] = ()
    id_letters: int = 0  # length of an id of letters and digits; 0: OpenAI's `call_…`


def json_call(reader: Reader, out: MessageBuilder) -> Script[None]:
    """`{"name": …, "arguments": {…}}`, streamed where the name comes first."""
    scan, num_scanned, end = JsonScan(), 0, None
    while not (head := HEAD.match(reader.text)):
        _check_first_key(reader.text)
        end = scan.feed(reader.text[num_scanned:])
        if end is not None:
            whole = yield from reader.json_value(_ignore)
            return _whole_call(whole, out)
        num_scanned = len(reader.text)
        yield from reader.more()
    reader.take(head.end())
    out.begin_call(json.loads(head[1]))
    yield from json_arguments(reader, out)
    yield from _rest_of_object(reader)


def json_arguments(reader: Reader, out: MessageBuilder) -> Script[None]:
    """A JSON object, passed on as it comes; ends the call."""
    arguments = yield from reader.json_value(out.arguments)
    _check_object(arguments)
    out.end_call()


def _check_first_key(text: str) -> None:
    first = FIRST_KEY.match(text)
    if first and first[1] not in CALL_KEYS:
        raise UnparsableError(f"{first[1]!r} is no key of a call")
    if text.strip() and not text.lstrip().startswith("{"):
        raise UnparsableError("no JSON object")


def _rest_of_object(reader: Reader) -> Script[None]:
    """Up to its last brace, which a model may also forget."""
    yield from reader.skip_space()
    if (yield from reader.next_of("}", ",")):
        yield from reader.json_value(_ignore, depth=1)


def _check_object(text: str) -> None:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise UnparsableError(str(error)) from error
    if not isinstance(value, dict):
        raise UnparsableError("arguments are no object")


def _whole_call(text: str, out: MessageBuilder) -> None:
    try:
        call = json.loads(text)
    except ValueError as error:
        raise UnparsableError(str(error)) from error
    function = call.get("function")
    if isinstance(function, dict):
        call = function
    name = call.get("name", call.get("function"))
    arguments = call.get("arguments", call.get("parameters"))
    if isinstance(arguments, str):
        _check_object(arguments)
    elif isinstance(arguments, dict) or arguments is None:
        arguments = dump(arguments or {})
    if not isinstance(name, str) or not isinstance(arguments, str):
        raise UnparsableError("a call needs a name and an object of arguments")
    out.call(name, arguments)


def _ignore(_piece: str) -> None:
    pass


def dump(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


class ArgumentWriter:
    """Arguments that are no JSON in the text, written as a JSON object while they come."""

    def __init__(self, function: str, out: MessageBuilder, schemas: ToolSchemas) -> None:
        self._function = function
        self._out = out
        self._schemas = schemas
        self._num_written = 0
        out.begin_call(function)
        out.arguments("{")

    def end(self) -> None:
        self._out.arguments("}")
        self._out.end_call()

    def read(self, key: str, reader: Reader, end: str, is_text: bool | None = None) -> Script[None]:
        """The value of `key`, up to the marker `end`. `is_text`: the format itself says so."""
        kinds = self._schemas.kinds(self._function, key)
        if is_text is not None:
            kinds = frozenset(("string",)) if is_text else kinds - {"string"}
        self._out.arguments(f"{', ' if self._num_written else ''}{dump(key)}: ")
        self._num_written += 1
        if kinds == {"string"}:
            yield from _text_value(reader, end, self._out.arguments)
        else:
            text = yield from reader.until(end)
            self._out.arguments(_typed(_without_newlines(text), kinds))


def _text_value(reader: Reader, end: str, emit: Emit) -> Script[None]:
    emit('"')
    trim = _Newlines()
    marker = yield from reader.pass_until(Markers((end,)), lambda t: emit(dump(trim(t))[1:-1]))
    if marker is None:
        raise EndOfTextError(f"{end} is missing")
    emit('"')


class _Newlines:
    """Takes the line breaks off that stand around a value, while it comes."""

    def __init__(self) -> None:
        self._is_fresh = True
        self._held = ""

    def __call__(self, text: str) -> str:
        if not text:
            return ""
        if self._is_fresh:
            self._is_fresh = False
            text = text.removeprefix("\n")
        text = self._held + text
        self._held = "\n" if text.endswith("\n") else ""
        return text.removesuffix("\n")


def _without_newlines(text: str) -> str:
    return text.removeprefix("\n").removesuffix("\n")


def _typed(text: str, kinds: frozenset[str]) -> str:
    if "string" in kinds and not ("null" in kinds and text.strip() == "null"):
        return dump(text)
    try:
        return dump(json.loads(text))
    except ValueError:
        word = {"True": "true", "False": "false", "None": "null"}.get(text.strip())
        return word or dump(text)
