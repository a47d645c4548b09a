"""What bounds the bodies of requests: the size of each, the time that it may take to arrive, and
how much of all of them is held at once. Compressed ones are inflated here, within the same bounds.
"""

from __future__ import annotations

import asyncio
from functools import partial
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mlx_lm_server.errors import (
    ClientGoneError,
    InvalidRequestError,
    OverloadedError,
    RequestTimeoutError,
    RequestTooLargeError,
)
from mlx_lm_server.server.http.content_coding import ACCEPT_ENCODING, CODINGS, IDENTITY, inflate
from mlx_lm_server.server.http.headers import has_body, header
from mlx_lm_server.server.http.http_errors import HttpError
from mlx_lm_server.server.large_work import run_large

# So many of the largest bodies are held at once, from their first byte to the end of the answer.
MAX_LARGEST_HELD = 8
# What each may have beside that, so that large ones do not keep ordinary ones out.
FREE_BYTES = 65536
RETRY_AFTER_S = 2.0


class BodyLimit:
    """`num_held_bytes` is what all requests hold beyond what is free."""

    def __init__(self, app: ASGIApp, max_bytes: int, timeout_s: float) -> None:
        self._app = app
        self.max_bytes = max_bytes
        self.timeout_s = timeout_s
        self.num_held_bytes = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        announced = header(scope, b"content-length")
        if announced is not None and int(announced) > self.max_bytes:
            raise self.too_large(f"{int(announced)} bytes")
        body = _BoundedReceive(self, receive)
        coding = _coding_of(scope)
        reader = body if coding == IDENTITY else _InflatingReceive(body, coding)
        try:
            await self._app(scope, reader, send)
        finally:
            body.release()

    def too_large(self, size: str) -> RequestTooLargeError:
        return RequestTooLargeError(
            f"the request body has {size}, the limit is {self.max_bytes} bytes"
        )

    def hold(self, num_bytes: int) -> None:
        """Raises OverloadedError where others hold too much."""
        if self.num_held_bytes + num_bytes > MAX_LARGEST_HELD * self.max_bytes:
            raise OverloadedError(
                "too many large request bodies are in work", retry_after_s=RETRY_AFTER_S
            )
        self.num_held_bytes += num_bytes


class _BoundedReceive:
    """`receive` of one request: bounded until the body is complete, then the plain one."""

    def __init__(self, limit: BodyLimit, receive: Receive) -> None:
        self._limit = limit
        self._receive = receive
        self._deadline_s = asyncio.get_running_loop().time() + limit.timeout_s
        self._num_read = 0
        self._num_kept = 0
        self._num_held = 0
        self.is_complete = False

    @property
    def max_bytes(self) -> int:
        return self._limit.max_bytes

    async def __call__(self) -> Message:
        if self.is_complete:
            return await self._receive()
        try:
            async with asyncio.timeout_at(self._deadline_s):
                message = await self._receive()
        except TimeoutError as error:
            raise RequestTimeoutError(
                f"the request body did not arrive within {self._limit.timeout_s:g} s"
            ) from error
        num_bytes = len(message.get("body", b""))
        self._num_read += num_bytes
        if self._num_read > self.max_bytes:
            raise self._limit.too_large(f"more than {self.max_bytes} bytes")
        self.keep(num_bytes)
        self.is_complete = not message.get("more_body", False)
        return message

    def keep(self, num_bytes: int) -> None:
        """Counts what is in memory for this request. Raises OverloadedError."""
        self._num_kept += num_bytes
        more = max(self._num_kept - FREE_BYTES, 0) - self._num_held
        self._limit.hold(more)
        self._num_held += more

    def release(self) -> None:
        self._limit.num_held_bytes -= self._num_held
        self._num_held = 0


class _InflatingReceive:
    """`receive` of one request whose body is compressed: inflated, it comes as one piece."""

    def __init__(self, body: _BoundedReceive, coding: str) -> None:
        self._body = body
        self._coding = coding

    async def __call__(self) -> Message:
        if self._body.is_complete:
            return await self._body()
        data = await read_all(self._body)
        whole = await run_large(partial(inflate, data, self._coding, self._body.max_bytes))
        self._body.keep(len(whole))
        return {"type": "http.request", "body": whole, "more_body": False}


def _coding_of(scope: Scope) -> str:
    """Returns the content coding of a body. Raises HttpError for one that is not read."""
    if not has_body(scope):
        return IDENTITY
    coding = (header(scope, b"content-encoding") or b"").decode("latin-1").strip().lower()
    if coding in ("", IDENTITY):
        return IDENTITY
    if coding not in CODINGS:
        raise HttpError(
            415,
            f"the body is of content coding {coding}; what is read is {ACCEPT_ENCODING}",
            "unsupported_content_encoding",
            {"accept-encoding": ACCEPT_ENCODING},
        )
    return coding


async def read_all(receive: Receive) -> bytes:
    """The whole body. Raises ClientGoneError where the client leaves before its end."""
    parts: list[bytes] = []
    while True:
        message: Any = await receive()
        if message["type"] == "http.disconnect":
            raise ClientGoneError("the client left while sending")
        parts.append(message.get("body", b""))
        if not message.get("more_body", False):
            return b"".join(parts)


async def read_body(receive: Receive) -> bytes:
    """The whole body, which is not empty. Raises ClientGoneError, InvalidRequestError."""
    body = await read_all(receive)
    if not body:
        raise InvalidRequestError("the body is empty; a JSON object is expected")
    return body
