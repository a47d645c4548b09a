"""The layers between the application's edge and its routes, as plain ASGI; `app.py` puts them
around each other. From the outside in:

    Border      gives a request its id, and makes error responses of exceptions
    PageGuard   refuses web pages that may not use this server (page_guard.py)
    Auth        finds out whose key a request has
    BodyLimit   bounds how large a body is and how long it takes (body_limit.py)

Only the Border sees what is sent, so a streamed piece costs one function call here.
"""

from __future__ import annotations

import logging
import secrets
import time
from collections import Counter
from collections.abc import Collection

import msgspec
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mlx_lm_server.errors import AuthenticationError, ClientGoneError
from mlx_lm_server.server.http.api_keys import ApiKeys
from mlx_lm_server.server.http.headers import Headers, header
from mlx_lm_server.server.http.http_errors import describe, headers_of

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
    """Returns headers for what of the request has no effect, as routes left it in the scope's
    state."""
    return [(b"x-warning", text.encode()) for text in scope["state"].get("warnings", ())]


def _request_id(scope: Scope) -> bytes:
    """Returns the client's own id where it is sane, so that its logs and ours can be matched."""
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
