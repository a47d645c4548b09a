"""What a request says of its tools: their names, and which kinds of values their arguments take."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mlx_lm_server.parsing.reader import UnparsableError
from mlx_lm_server.parsing.strict_schema import StrictSchema, at

MAX_REFERENCES = 16
NAMESPACE = "functions."
# Names that people give types, though JSON Schema has others.
ALIASES = {
    **dict.fromkeys(("str", "text", "enum"), "string"),
    **dict.fromkeys(("int", "long"), "integer"),
    **dict.fromkeys(("float", "double"), "number"),
    **dict.fromkeys(("bool",), "boolean"),
    **dict.fromkeys(("dict", "map"), "object"),
    **dict.fromkeys(("list", "tuple"), "array"),
    **dict.fromkeys(("none",), "null"),
}
# Keywords that only values of one kind can fulfil.
TELLING_KEYWORDS = {
    "properties": "object",
    "additionalProperties": "object",
    "items": "array",
    "prefixItems": "array",
}


class ToolSchemas:
    """Reads the tools of one request. Without any tools every name is allowed and nothing is known
    of arguments, unless they `are_all`: then there is nothing to call."""

    def __init__(self, tools: Sequence[Mapping[str, Any]], *, are_all: bool = False) -> None:
        self._allows_any = not tools and not are_all
        functions = [tool.get("function") or {} for tool in tools]
        self._parameters: dict[str, Mapping[str, Any]] = {
            str(f.get("name")): p if isinstance(p := f.get("parameters"), dict) else {}
            for f in functions
        }
        self.strict = {
            str(f.get("name")): StrictSchema(f.get("parameters") or {})
            for f in functions
            if f.get("strict")
        }

    def resolve(self, written: str) -> str:
        """Returns the tool's name that a model wrote, maybe in quotes or in a namespace.

        Raises UnparsableError where the request has no such tool.
        """
        name = written.strip().strip("\"'").strip()
        if not name:
            raise UnparsableError("a call needs a name")
        short = name.removeprefix(NAMESPACE)
        first, _, last = short.partition(".")
        if first == last:  # some models write a namespace of the same name
            short = first
        if name in self._parameters:
            return name
        if short in self._parameters or self._allows_any:
            return short
        raise UnparsableError(f"no tool is called {name[:100]!r}")

    def declares(self, function: str, argument: str) -> bool | None:
        """Tells whether the function's schema names the argument; None where it names none."""
        properties = self._properties(function)
        return argument in properties if properties else None

    def schema_of(self, function: str, argument: str) -> Mapping[str, Any]:
        """Returns the argument's schema with references resolved; empty where there is none."""
        root = self._parameters.get(function, {})
        return _resolved(self._properties(function).get(argument), root)

    def root_of(self, function: str) -> Mapping[str, Any]:
        """Returns the whole schema of the function's parameters, in which references point."""
        return self._parameters.get(function, {})

    def kinds(self, function: str, argument: str) -> frozenset[str]:
        """Returns the JSON types that the argument may have; empty where that is not known."""
        root = self._parameters.get(function, {})
        return kinds_of(self._properties(function).get(argument), root)

    def _properties(self, function: str) -> Mapping[str, Any]:
        root = self._parameters.get(function, {})
        return dict(_properties(root, root, set()))


def kinds_of(schema: Any, root: Mapping[str, Any]) -> frozenset[str]:
    """Returns the JSON types that values of a schema may have; empty where that is not known.
    References are resolved in `root`; of what all of `allOf` allow, the part is returned."""
    return frozenset(_kinds(schema, root, {}) or ())


def _properties(schema: Any, root: Mapping[str, Any], seen: set[int]) -> Iterator[tuple[str, Any]]:
    """Yields each schema's properties once, however many references lead to it."""
    schema = _resolved(schema, root)
    if id(schema) in seen:
        return
    seen.add(id(schema))
    for part in _options(schema, "allOf", "anyOf", "oneOf"):
        yield from _properties(part, root, seen)
    own = schema.get("properties")
    if isinstance(own, dict):
        yield from own.items()


_Known = dict[int, set[str] | None]


def _kinds(schema: Any, root: Mapping[str, Any], known: _Known) -> set[str] | None:
    """Returns None for a schema within which this one stands, which adds nothing to it. `known`
    are those that were read."""
    schema = _resolved(schema, root)
    if id(schema) not in known:
        known[id(schema)] = None
        known[id(schema)] = _own_kinds(schema, root, known)
    return known[id(schema)]


def _own_kinds(schema: Mapping[str, Any], root: Mapping[str, Any], known: _Known) -> set[str]:
    kind = schema.get("type")
    if isinstance(kind, str):
        return {ALIASES.get(kind.lower(), kind)}
    if isinstance(kind, list):
        return {ALIASES.get(k.lower(), k) for k in kind if isinstance(k, str)}
    if isinstance(values := schema.get("enum"), list) and values:
        return {kind_of(value) for value in values}
    if "const" in schema:
        return {kind_of(schema["const"])}
    if options := _options(schema, "anyOf", "oneOf"):
        told = [k for option in options if (k := _kinds(option, root, known)) is not None]
        return set().union(*told) if all(told) else set()
    if told := [k for part in _options(schema, "allOf") if (k := _kinds(part, root, known))]:
        return set.intersection(*told) or set.union(*told)
    return {kind for word, kind in TELLING_KEYWORDS.items() if word in schema}


def _options(schema: Mapping[str, Any], *words: str) -> list[Any]:
    return [one for word in words if isinstance(schema.get(word), list) for one in schema[word]]


def _resolved(schema: Any, root: Mapping[str, Any]) -> Mapping[str, Any]:
    for _ in range(MAX_REFERENCES):
        if not isinstance(schema, dict):
            return {}
        reference = schema.get("$ref")
        if not isinstance(reference, str):
            return schema
        schema = at(root, reference)
    return {}


def kind_of(value: Any) -> str:
    """Returns the JSON type of a value."""
    match value:
        case bool():
            return "boolean"
        case int():
            return "integer"
        case float():
            return "number"
        case str():
            return "string"
        case list():
            return "array"
        case dict():
            return "object"
    return "null"
