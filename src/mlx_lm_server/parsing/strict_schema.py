"""Whether arguments fit the schema of a strict tool: the part of JSON Schema that OpenAI allows.

https://platform.openai.com/docs/guides/structured-outputs#supported-schemas
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from mlx_lm_server.parsing.reader import UnparsableError

CHECKED = frozenset(
    {"type", "enum", "const", "properties", "required", "additionalProperties", "items", "anyOf"}
)
# What describes and does not restrict.
REMARKS = frozenset({"$schema", "$id", "$defs", "definitions", "title", "description", "default"})
TYPES: dict[str, tuple[type, ...]] = {
    "string": (str,),
    "number": (int, float),
    "integer": (int,),
    "boolean": (bool,),
    "object": (dict,),
    "array": (list,),
    "null": (type(None),),
}
MAX_DEPTH = 64


def unknown_keyword(schema: Any) -> str | None:
    """A keyword that would not be checked."""
    return next(_unknown_keywords(schema), None)


def _unknown_keywords(schema: Any) -> Iterator[str]:
    if not isinstance(schema, Mapping):
        return
    yield from (k for k in schema if k not in CHECKED | REMARKS | {"$ref"})
    for name in ("properties", "$defs", "definitions"):
        inner = schema.get(name)
        for value in inner.values() if isinstance(inner, Mapping) else ():
            yield from _unknown_keywords(value)
    options = schema.get("anyOf")
    for value in [schema.get("items"), *(options if isinstance(options, list) else ())]:
        yield from _unknown_keywords(value)


class StrictSchema:
    """Of the parameters of one tool."""

    def __init__(self, schema: Mapping[str, Any]) -> None:
        self._root = schema

    def check(self, value: Any) -> None:
        """Raises UnparsableError, naming the place."""
        self._check(value, self._root, "arguments", MAX_DEPTH)

    def _check(self, value: Any, schema: Any, place: str, depth: int) -> None:
        if not isinstance(schema, Mapping) or depth == 0:
            return
        if "$ref" in schema:
            self._check(value, at(self._root, str(schema["$ref"])), place, depth - 1)
        if "anyOf" in schema and not any(
            self._fits(value, option, place, depth) for option in schema["anyOf"]
        ):
            raise UnparsableError(f"{place} is none of what it may be")
        _check_kind(value, schema, place)
        if isinstance(value, dict):
            self._check_object(value, schema, place, depth)
        elif isinstance(value, list):
            for i, item in enumerate(value):
                self._check(item, schema.get("items"), f"{place}[{i}]", depth - 1)

    def _fits(self, value: Any, schema: Any, place: str, depth: int) -> bool:
        try:
            self._check(value, schema, place, depth - 1)
        except UnparsableError:
            return False
        return True

    def _check_object(
        self, value: dict[str, Any], schema: Mapping[str, Any], place: str, depth: int
    ) -> None:
        properties = schema.get("properties") or {}
        for name in schema.get("required") or ():
            if name not in value:
                raise UnparsableError(f"{place}.{name} is missing")
        others = schema.get("additionalProperties", True)
        for name, item in value.items():
            if name not in properties and others is False:
                raise UnparsableError(f"{place}.{name} is unknown")
            self._check(item, properties.get(name, others), f"{place}.{name}", depth - 1)


def at(root: Mapping[str, Any], reference: str) -> Any:
    """Returns what a reference within a schema points to (RFC 6901); None where nothing is."""
    node: Any = root
    for part in reference.removeprefix("#").strip("/").split("/"):
        if part:
            part = part.replace("~1", "/").replace("~0", "~")
            node = node.get(part) if isinstance(node, Mapping) else None
    return node


def _check_kind(value: Any, schema: Mapping[str, Any], place: str) -> None:
    kinds = schema.get("type")
    names = [kinds] if isinstance(kinds, str) else kinds or []
    if names and not any(_is_of(value, name) for name in names):
        raise UnparsableError(f"{place} must be of type {' or '.join(map(str, names))}")
    if "enum" in schema and value not in schema["enum"]:
        raise UnparsableError(f"{place} is none of the values that it may have")
    if "const" in schema and value != schema["const"]:
        raise UnparsableError(f"{place} is not the value that it must have")


def _is_of(value: Any, name: str) -> bool:
    if isinstance(value, bool):
        return name == "boolean"
    return isinstance(value, TYPES.get(name, ()))
