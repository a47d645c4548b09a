"""Arguments that are no JSON in the text, written as a JSON object while they come."""

from __future__ import annotations

import ast
from collections.abc import Mapping
from typing import Any

from mlx_lm_server.parsing.message import MessageBuilder
from mlx_lm_server.parsing.reader import UnparsableError
from mlx_lm_server.parsing.tool_formats.format import dump, load
from mlx_lm_server.parsing.tool_schemas import ToolSchemas, kind_of

# Arguments that some models wrap all others into.
WHOLES = frozenset({"arguments", "input", "parameters", "properties"})
WORDS: Mapping[str, Any] = {"True": True, "False": False, "None": None}


class ArgumentWriter:
    """Begins a call and writes its arguments one by one. One per call."""

    def __init__(self, function: str, out: MessageBuilder, schemas: ToolSchemas) -> None:
        """Raises UnparsableError where the request has no such tool."""
        self.function = schemas.resolve(function)
        self._out = out
        self._schemas = schemas
        self._written: set[str] = set()
        out.begin_call(self.function)
        out.arguments("{")

    def expects(self, key: str) -> bool:
        """Tells whether the tool may have such an argument, which was not written yet."""
        return key not in self._written and self._schemas.declares(self.function, key) is not False

    def holds_all(self, key: str) -> bool:
        """Tells whether an argument of that name, which the tool has not, is the whole of them."""
        is_unknown = self._schemas.declares(self.function, key) is False
        return key in WHOLES and is_unknown and not self._written

    def kinds(self, key: str) -> frozenset[str]:
        return self._schemas.kinds(self.function, key)

    def begin(self, key: str) -> None:
        """Writes the key. Raises UnparsableError where it is there already."""
        if key in self._written:
            raise UnparsableError(f"the argument {key[:100]!r} is given twice")
        self._out.arguments(f"{', ' if self._written else ''}{dump(key)}: ")
        self._written.add(key)

    def begin_text(self) -> None:
        self._out.arguments('"')

    def text(self, piece: str) -> None:
        if piece:
            self._out.arguments(dump(piece)[1:-1])

    def end_text(self) -> None:
        self._out.arguments('"')

    def value(self, key: str, text: str, kinds: frozenset[str]) -> None:
        """Writes the value that a text stands for. Raises UnparsableError for one of no kind that
        the argument may have."""
        self._out.arguments(dump(value_of(text, kinds, key)))

    def whole(self, text: str) -> None:
        """Writes all arguments of a text that is an object of them. Raises UnparsableError."""
        arguments = value_of(text, frozenset(("object",)), "arguments")
        for key, value in arguments.items():
            self.begin(key)
            self.json(value)

    def json(self, value: Any) -> None:
        self._out.arguments(dump(value))

    def end(self) -> None:
        self._out.arguments("}")
        self._out.end_call()


def value_of(text: str, kinds: frozenset[str], key: str) -> Any:
    """Returns what a bare text means as a value of one of the kinds; where they are not known, of
    the kind that it looks like. Raises UnparsableError."""
    stripped = text.strip()
    if not kinds:
        value = _literal(stripped)
        return text if value is None and stripped not in ("null", "None") else value
    if "null" in kinds and stripped.lower() in ("null", "none"):
        return None
    if "string" in kinds:
        return text
    value = _as_kind(_literal(stripped), stripped, kinds)
    if kind_of(value) not in kinds and not (kind_of(value) == "integer" and "number" in kinds):
        raise UnparsableError(f"{key[:100]!r} must be of type {' or '.join(sorted(kinds))}")
    return value


def _literal(text: str) -> Any:
    """Returns the value of JSON, or else of a Python literal; None where it is neither."""
    try:
        return load(text)
    except UnparsableError:
        pass
    if text in WORDS or not text.startswith(("[", "{", "(")):
        return WORDS.get(text)
    try:
        value = ast.literal_eval(text)
        return load(dump(value))  # what JSON has no words for is no value
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError, UnparsableError):
        return None


def _as_kind(value: Any, text: str, kinds: frozenset[str]) -> Any:
    """Returns a whole number where only such are allowed and the value is one, and a truth value
    however it is spelt."""
    if "boolean" in kinds and text.lower() in ("true", "false"):
        return text.lower() == "true"
    is_whole = isinstance(value, float) and value.is_integer()
    return int(value) if is_whole and "integer" in kinds and "number" not in kinds else value
