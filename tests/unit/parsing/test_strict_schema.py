from __future__ import annotations

from typing import Any

import pytest

from mlx_lm_server.parsing.reader import UnparsableError
from mlx_lm_server.parsing.strict_schema import StrictSchema, unknown_keyword

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "count": {"type": ["integer", "null"]},
        "color": {"enum": ["red", "blue"]},
        "parts": {"type": "array", "items": {"$ref": "#/$defs/part"}},
        "size": {"anyOf": [{"type": "number"}, {"const": "any"}]},
    },
    "required": ["name"],
    "additionalProperties": False,
    "$defs": {"part": {"type": "object", "properties": {"on": {"type": "boolean"}}}},
}


@pytest.mark.parametrize(
    "value",
    [
        {"name": "x"},
        {"name": "x", "count": None, "color": "red", "parts": [{"on": True}], "size": 1.5},
        {"name": "", "count": 3, "parts": [], "size": "any"},
    ],
)
def test_what_fits(value: Any) -> None:
    StrictSchema(SCHEMA).check(value)


@pytest.mark.parametrize(
    ("value", "place"),
    [
        ([], "arguments"),
        ({}, "arguments.name"),
        ({"name": 1}, "arguments.name"),
        ({"name": "x", "count": 1.5}, "arguments.count"),
        ({"name": "x", "count": True}, "arguments.count"),
        ({"name": "x", "color": "green"}, "arguments.color"),
        ({"name": "x", "parts": [{}, {"on": 1}]}, "arguments.parts[1].on"),
        ({"name": "x", "size": "some"}, "arguments.size"),
        ({"name": "x", "other": 1}, "arguments.other"),
    ],
)
def test_what_does_not_fit_is_named(value: Any, place: str) -> None:
    with pytest.raises(UnparsableError, match=place.replace("[", r"\[")):
        StrictSchema(SCHEMA).check(value)


def test_a_schema_that_refers_to_itself_ends() -> None:
    StrictSchema({"$ref": "#"}).check({})


def test_a_reference_may_name_a_key_with_a_slash() -> None:
    schema = {
        "$defs": {"a/b~c": {"type": "integer"}},
        "properties": {"x": {"$ref": "#/$defs/a~1b~0c"}},
    }
    StrictSchema(schema).check({"x": 1})
    with pytest.raises(UnparsableError, match="x must be of type integer"):
        StrictSchema(schema).check({"x": "no"})


def test_keywords_that_are_not_checked_are_found() -> None:
    assert unknown_keyword(SCHEMA) is None
    assert unknown_keyword({"properties": {"a": {"minLength": 1}}}) == "minLength"
    assert unknown_keyword({"anyOf": [{"items": {"oneOf": []}}]}) == "oneOf"
