from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mlx_lm_server.errors import InvalidRequestError
from mlx_lm_server.server.http import json_body
from mlx_lm_server.server.http.json_body import LARGE_BYTES, MAX_DEPTH, parse_object

SCALARS = st.none() | st.booleans() | st.integers() | st.text()
VALUES = st.recursive(
    SCALARS | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=10,
)


@given(st.dictionaries(st.text(), VALUES))
def test_what_json_says_is_what_comes_out(value: dict[str, Any]) -> None:
    assert parse_object(json.dumps(value).encode()) == value


@given(st.binary(max_size=60))
def test_any_bytes_are_an_object_or_an_invalid_request(body: bytes) -> None:
    try:
        assert isinstance(parse_object(body), dict)
    except InvalidRequestError:
        return


@given(st.text(alphabet='{}[]:,"\\ud8dcf019eE+-. tn', max_size=40))
def test_any_text_is_an_object_or_an_invalid_request(text: str) -> None:
    try:
        parse_object(text.encode())
    except InvalidRequestError:
        return


def test_depth_is_bounded_but_not_tight() -> None:
    def nested(depth: int) -> bytes:
        return b'{"a":' + b"[" * depth + b"]" * depth + b"}"

    assert parse_object(nested(MAX_DEPTH))
    with pytest.raises(InvalidRequestError, match="nested too deeply"):
        parse_object(nested(MAX_DEPTH + 1))


def test_a_key_may_come_again_in_another_object() -> None:
    assert parse_object(b'{"a":{"k":1},"b":{"k":2}}') == {"a": {"k": 1}, "b": {"k": 2}}
    with pytest.raises(InvalidRequestError, match="duplicate key 'k'"):
        parse_object(b'{"a":[{"k":1,"k":2}]}')


ROOM = b" " * LARGE_BYTES


def outcome(body: bytes) -> Any:
    """The object, or why there is none."""
    try:
        return parse_object(body)
    except InvalidRequestError as error:
        return str(error)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.dictionaries(st.text(), VALUES))
def test_a_large_body_is_read_like_a_small_one(value: dict[str, Any]) -> None:
    assert parse_object(json.dumps(value).encode() + ROOM) == value


@pytest.mark.parametrize(
    "body",
    [
        b'{"a":NaN}',
        b'{"a":1e999}',
        b'{"a":1,"a":2}',
        b'{"a":[{"k":1,"k":2}]}',
        b'{"a":"\\ud800"}',
        b'{"a":"\xff"}',
        b'{"a":' + b"[" * 100_000,
        b'{"a":' + b"[" * 70 + b"]" * 70 + b"}",
        b"[]",
        b'{"a":[1,]}',
        b'{"a" 1}',
        b'{"a":1}x',
    ],
    ids=lambda body: repr(body[:20]),
)
def test_a_large_body_is_refused_like_a_small_one(body: bytes) -> None:
    small = outcome(body)
    assert isinstance(small, str)
    assert outcome(body + ROOM) == small


@pytest.mark.parametrize("unit", [b"1,", b'"",', b"[],", b'{"":0},', b"null,", b"[[[0]]],"])
def test_a_large_body_holds_only_so_many_values(
    unit: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They may take thirty times the memory of their text."""
    monkeypatch.setattr(json_body, "MAX_VALUES", 1001)
    most = 1000 // {b'{"":0},': 2, b"[[[0]]],": 4}.get(unit, 1)
    fits = b'{"a":[' + (unit * most)[:-1] + b"]}"
    assert len(parse_object(fits + ROOM)["a"]) == most
    with pytest.raises(InvalidRequestError, match="more than 1001 values"):
        parse_object(b'{"a":[' + unit * most + b"0]}" + ROOM)


def test_text_is_no_value_whatever_is_in_it() -> None:
    text = '{"a": [1, 2, {}]}' * 200_000
    assert parse_object(json.dumps({"a": text}).encode()) == {"a": text}
