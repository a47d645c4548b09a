"""What every HTTP request passes, as plain ASGI: nothing here costs anything per streamed token
but one function call.

    Border      request id; exceptions → error responses; the only `except Exception` of the server
    PageGuard   is it a page that may not (page_guard.py)
    Auth        who is it
    BodyLimit   how much, how long
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections import Counter
from collections.abc import Collection
from typing import Any

import msgspec
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mlx_lm_server.errors import (
    AuthenticationError,
    InvalidRequestError,
    RequestTimeoutError,
    RequestTooLargeError,
)
from mlx_lm_server.server.api_keys import ApiKeys
from mlx_lm_server.server.generation import ClientGoneError
from mlx_lm_server.server.headers import Headers, header
from mlx_lm_server.server.http_errors import describe, headers_of

log = logging.getLogger(__name__)

MAX_REQUEST_ID_CHARS = 128


async def send_json(send: Send, status: int, body: bytes, extra: dict[str, str]) -> None:
    headers: Headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
        *((name.encode(), value.encode()) for name, value in extra.items()),
    ]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


class Border:
    """The outermost layer. Counts responses by status into `responses`."""

    def __init__(self, app: ASGIApp, responses: Counter[int]) -> None:
        self._app = app
        self._responses = responses

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = _request_id(scope)
        scope.setdefault("state", {})["arrival_s"] = time.monotonic()
        has_started = False

        async def send_tagged(message: Message) -> None:
            nonlocal has_started
            if not has_started and message["type"] == "http.response.start":
                has_started = True
                more = [(b"x-request-id", request_id), *_warnings(scope)]
                message["headers"] = [*message["headers"], *more]
                self._responses[message["status"]] += 1
            await send(message)

        try:
            await self._app(scope, receive, send_tagged)
        except ClientGoneError:
            return
        except Exception as error:
            status, body = describe(error)
            if status == 500:
                log.exception("%s %s failed", scope["method"], scope["path"])
            if not has_started:
                await send_json(
                    send_tagged, status, msgspec.json.encode(body), dict(headers_of(error))
                )


def _warnings(scope: Scope) -> Headers:
    """What of the request has no effect, as routes left it in the scope's state."""
    return [(b"x-warning", text.encode()) for text in scope["state"].get("warnings", ())]


def _request_id(scope: Scope) -> bytes:
    """The client's own where it is sane, so that its logs and ours can be matched."""
    given = header(scope, b"x-request-id")
    if given and len(given) <= MAX_REQUEST_ID_CHARS and given.isascii() and min(given) > ord(" "):
        return given
    return secrets.token_hex(16).encode()


class Auth:
    """Sets `scope["state"]["client_key"]`: the name of the key, empty where none is asked for.
    Probes and browsers, which carry no keys, may GET the `open_paths`."""

    def __init__(self, app: ASGIApp, keys: ApiKeys, open_paths: Collection[str]) -> None:
        self._app = app
        self._keys = keys
        self._open_paths = frozenset(open_paths)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            name = ""
            if self._keys.is_required and scope["path"] not in self._open_paths:
                name = self._identify(scope)
            scope.setdefault("state", {})["client_key"] = name
        await self._app(scope, receive, send)

    def _identify(self, scope: Scope) -> str:
        given = header(scope, b"authorization") or b""
        scheme, _, key = given.partition(b" ")
        if scheme.lower() != b"bearer" or not key:
            raise AuthenticationError("no API key: send it as `Authorization: Bearer KEY`")
        name = self._keys.name_of(key.strip())
        if name is None:
            raise AuthenticationError("the API key is not valid")
        return name


class BodyLimit:
    """Bounds a body's size, announced or not, and the time that it may take to arrive."""

    def __init__(self, app: ASGIApp, max_bytes: int, timeout_s: float) -> None:
        self._app = app
        self._max_bytes = max_bytes
        self._timeout_s = timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        announced = header(scope, b"content-length")
        if announced is not None and int(announced) > self._max_bytes:
            raise self._too_large(f"{int(announced)} bytes")
        await self._app(scope, _BoundedReceive(self, receive), send)

    def _too_large(self, size: str) -> RequestTooLargeError:
        return RequestTooLargeError(
            f"the request body has {size}, the limit is {self._max_bytes} bytes"
        )

    async def read_body_part(self, receive: Receive, num_read: int, deadline_s: float) -> Message:
        try:
            async with asyncio.timeout_at(deadline_s):
                message = await receive()
        except TimeoutError as error:
            raise RequestTimeoutError(
                f"the request body did not arrive within {self._timeout_s:g} s"
            ) from error
        if num_read + len(message.get("body", b"")) > self._max_bytes:
            raise self._too_large(f"more than {self._max_bytes} bytes")
        return message

    def deadline_s(self) -> float:
        return asyncio.get_running_loop().time() + self._timeout_s


class _BoundedReceive:
    """`receive` of one request: bounded until the body is complete, then the plain one."""

    def __init__(self, limit: BodyLimit, receive: Receive) -> None:
        self._limit = limit
        self._receive = receive
        self._deadline_s = limit.deadline_s()
        self._num_read = 0
        self._is_complete = False

    async def __call__(self) -> Message:
        if self._is_complete:
            return await self._receive()
        message = await self._limit.read_body_part(self._receive, self._num_read, self._deadline_s)
        self._num_read += len(message.get("body", b""))
        self._is_complete = not message.get("more_body", False)
        return message


async def read_body(receive: Receive) -> bytes:
    """The whole body. Raises ClientGoneError where the client leaves before its end."""
    parts: list[bytes] = []
    while True:
        message: Any = await receive()
        if message["type"] == "http.disconnect":
            raise ClientGoneError("the client left while sending")
        parts.append(message.get("body", b""))
        if not message.get("more_body", False):
            break
    body = b"".join(parts)
    if not body:
        raise InvalidRequestError("the body is empty; a JSON object is expected")
    return body
