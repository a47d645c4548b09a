"""A request body as a JSON object, and everything that JSON parsers let through refused.

NaN and Infinity, numbers beyond a float, duplicate keys, lone surrogates, nesting without end: each
would mean something else to somebody further on.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from json import decoder, scanner
from typing import Any, NoReturn

from mlx_lm_server.errors import InvalidRequestError

MAX_DEPTH = 64
NUMBERS = frozenset({int, float})
# A body longer than this may hold so many values. Its parser lets other threads have their turn.
LARGE_BYTES = 2**20
MAX_VALUES = 1_000_000


def parse_object(body: bytes) -> dict[str, Any]:
    """Returns the JSON object in a body. Raises InvalidRequestError."""
    try:
        parser = _PatientDecoder() if len(body) > LARGE_BYTES else _decoder
        value = parser.decode(body.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise InvalidRequestError(f"the body is no UTF-8 (byte {error.start})") from error
    except json.JSONDecodeError as error:
        raise InvalidRequestError(
            f"the body is no JSON: {error.msg} at line {error.lineno}, column {error.colno}"
        ) from error
    except RecursionError as error:
        raise InvalidRequestError("the body is nested too deeply") from error
    except ValueError as error:
        raise InvalidRequestError(f"the body is no JSON: {error}") from error
    if not isinstance(value, dict):
        raise InvalidRequestError("the body must be a JSON object")
    for name, item in value.items():
        _check(item, name, _printable(name), MAX_DEPTH)
    return value


def _check(value: Any, name: str, field: str, depth: int) -> None:
    """`field` is the top-level field that a complaint names."""
    _encodable(name, field)
    if isinstance(value, str):
        _encodable(value, field)
    elif isinstance(value, dict | list):
        if depth == 0:
            raise InvalidRequestError(f"`{field}` is nested too deeply", param=field)
        if isinstance(value, dict):
            for key, item in value.items():
                _check(item, key, field, depth - 1)
        elif not NUMBERS.issuperset(map(type, value)):  # token ids come by the ten thousand
            for item in value:
                _check(item, "", field, depth - 1)


def _encodable(text: str, field: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidRequestError(
            f"`{field}` is no valid Unicode: a lone surrogate", param=field
        ) from error


def _printable(name: str) -> str:
    return name.encode("utf-8", "backslashreplace").decode()[:100]


def _refuse_constant(word: str) -> NoReturn:
    raise ValueError(f"{word} is no JSON number")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:20]} is too large")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        for name, _ in pairs:
            if name in seen:
                raise ValueError(f"duplicate key {_printable(name)!r}")
            seen.add(name)
    return found


Scan = Callable[[str, int], tuple[Any, int]]


class _Decoder(json.JSONDecoder):
    """The standard library's decoder, with our refusals."""

    def __init__(self) -> None:
        super().__init__(
            object_pairs_hook=_unique, parse_constant=_refuse_constant, parse_float=_finite
        )


class _PatientDecoder(_Decoder):
    """Reads one large text: in Python but for its strings, since the one in C holds all threads up
    while it makes lists without end; and it counts the values, which take more memory than their
    text."""

    def __init__(self) -> None:
        super().__init__()
        self._num_values = 0
        self.parse_object = self._parse_object
        self.parse_array = self._parse_array
        self.scan_once = scanner.py_make_scanner(self)  # type: ignore[attr-defined]

    def _parse_object(self, place: Any, strict: bool, scan: Scan, *hooks: Any) -> Any:
        return decoder.JSONObject(place, strict, self._counted(scan), *hooks)  # type: ignore[attr-defined]

    def _parse_array(self, place: Any, scan: Scan) -> Any:
        return decoder.JSONArray(place, self._counted(scan))  # type: ignore[attr-defined]

    def _counted(self, scan: Scan) -> Scan:
        def scan_next(text: str, at: int) -> tuple[Any, int]:
            self._num_values += 1
            if self._num_values > MAX_VALUES:
                raise InvalidRequestError(f"the body holds more than {MAX_VALUES} values")
            return scan(text, at)

        return scan_next


_decoder = _Decoder()
