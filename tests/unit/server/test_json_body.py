from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_lm_server.errors import InvalidRequestError
from mlx_lm_server.server.json_body import MAX_DEPTH, parse_object

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
