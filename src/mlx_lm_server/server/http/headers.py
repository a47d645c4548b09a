"""The headers of a request, as ASGI has them: pairs of bytes, names in lower case."""

from __future__ import annotations

from starlette.types import Scope

Headers = list[tuple[bytes, bytes]]


def header(scope: Scope, name: bytes) -> bytes | None:
    """The first value of a header; `name` in lower case."""
    return next(iter(headers(scope, name)), None)


def headers(scope: Scope, name: bytes) -> list[bytes]:
    """All values of a header; `name` in lower case."""
    return [value for key, value in scope["headers"] if key == name]


def has_body(scope: Scope) -> bool:
    """Tells whether a body is announced, which HTTP asks of whoever sends one."""
    length = header(scope, b"content-length")
    return header(scope, b"transfer-encoding") is not None or length not in (None, b"0")
