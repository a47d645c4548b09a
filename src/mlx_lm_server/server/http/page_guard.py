"""What web pages may not do with a server that asks for no key.

A browser carries every page's requests to this machine. A page may give its own name this
machine's address, and then counts as the server's own (DNS rebinding): the header Host shows the
name. Any page may send a simple POST without asking: Origin and Sec-Fetch-Site, which scripts
cannot set, show where it comes from, and what is no JSON is what needs no asking. A key is
something that no page has, so with one neither is looked at.
"""

from __future__ import annotations

from starlette.types import ASGIApp, Receive, Scope, Send

from mlx_lm_server.config import ServerConfig
from mlx_lm_server.errors import InvalidRequestError
from mlx_lm_server.server.http.api_keys import ApiKeys
from mlx_lm_server.server.http.headers import has_body, header, headers
from mlx_lm_server.server.http.http_errors import HttpError
from mlx_lm_server.web_names import is_loopback, is_loopback_name, split_authority, split_origin

# Such requests change nothing; what they read, no other page is shown.
READING = frozenset({"GET", "HEAD", "OPTIONS"})
# `curl -d` and others say so of whatever they send; a page's form says so of what is no JSON.
UNSAID = ("", "application/x-www-form-urlencoded")


class PageGuard:
    """Asks nothing of a client that is no browser but to know where it is, and to send JSON."""

    def __init__(self, app: ASGIApp, server: ServerConfig, keys: ApiKeys) -> None:
        self._app = app
        self._keys = keys
        self._is_local = server.uds is None and is_loopback(server.host)
        self._hosts = frozenset(server.allowed_hosts)
        self._origins = frozenset(server.cors_origins)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            host = _host(scope)
            if self._hosts or (self._is_local and not self._keys.is_required):
                self._check_host(host)
            if scope["method"] not in READING:
                if not self._keys.is_required:
                    self._check_origin(scope, host)
                _check_content_type(scope)
        await self._app(scope, receive, send)

    def _check_host(self, host: str | None) -> None:
        """Raises HttpError for a foreign Host; HTTP/1.0, which no browser speaks, may come
        without."""
        if host is None:
            return
        name, _ = split_authority(host) or ("", None)
        if not is_loopback_name(name) and self._hosts.isdisjoint((name, "*")):
            raise HttpError(
                403,
                f"the header Host: {host} names no host of this server, which answers to "
                f"{', '.join(('localhost', *sorted(self._hosts)))} only: "
                f"`--allowed-hosts {name or 'NAME'}` allows it",
                "host_not_allowed",
            )

    def _check_origin(self, scope: Scope, host: str | None) -> None:
        origin = _text(header(scope, b"origin"))
        site = _text(header(scope, b"sec-fetch-site"))
        if not self._origins.isdisjoint((origin, "*")) or site == "same-origin":
            return
        is_foreign = site in ("cross-site", "same-site")
        if origin and not is_foreign:
            is_foreign = not _is_same(origin, host)
        if is_foreign:
            shown = origin or "ORIGIN"
            raise HttpError(
                403,
                f"a web page of another origin ({origin or site}) may not use this server: "
                f"`--cors-origins {shown}` allows it",
                "origin_not_allowed",
            )


def _host(scope: Scope) -> str | None:
    """The one header Host (RFC 9112, 3.2). Raises InvalidRequestError."""
    given = headers(scope, b"host")
    if not given and scope["http_version"] == "1.0":
        return None
    if len(given) != 1:
        problem = "has no header Host" if not given else "has several headers Host"
        raise InvalidRequestError(f"the request {problem}")
    host = _text(given[0])
    if split_authority(host) is None:
        raise InvalidRequestError(f"the header Host: {host} is no host")
    return host


def _is_same(origin: str, host: str | None) -> bool:
    """Tells whether the page came from this server; the scheme may differ, as a proxy may speak
    TLS."""
    page, own = split_origin(origin), split_authority(host or "")
    if page is None or own is None:
        return False
    return page == own or (page[0] == own[0] and own[1] is None and page[1] in ("80", "443"))


def _check_content_type(scope: Scope) -> None:
    """Raises HttpError for a body that says it is no JSON, and for a page's that does not say."""
    if not has_body(scope):
        return
    whole = _text(header(scope, b"content-type"))
    kind = whole.partition(";")[0].strip().lower()
    is_json = kind == "application/json" or (
        kind.startswith("application/") and kind.endswith("+json")
    )
    is_page = header(scope, b"origin") is not None or header(scope, b"sec-fetch-site") is not None
    if not is_json and (is_page or kind not in UNSAID):
        raise HttpError(
            415,
            f"the body is {whole or 'of no content type'}; send it as "
            "`Content-Type: application/json`",
            "unsupported_media_type",
            {"accept": "application/json"},
        )


def _text(value: bytes | None) -> str:
    return (value or b"").decode("latin-1").strip()
