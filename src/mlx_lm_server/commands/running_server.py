"""A running server as commands reach it: its address, its key, and what goes wrong on the way."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Annotated, Any
from urllib.parse import urlsplit

import httpx
import typer

from mlx_lm_server.bench.sse import error_message
from mlx_lm_server.errors import ConfigError, ServerError
from mlx_lm_server.web_names import DEFAULT_URL, is_loopback

KEY_VARIABLE = "OPENAI_API_KEY"
ApiKey = Annotated[
    str | None,
    typer.Option(metavar="KEY", envvar=KEY_VARIABLE, help="Sent as `Authorization: Bearer KEY`."),
]
CONNECT_S = 5.0
MAX_MESSAGE = 500


class UnreachableError(ServerError):
    """Nobody answered, or what came was cut off: `what` alone, without what to do about it."""

    def __init__(self, what: str, advice: str = "") -> None:
        super().__init__(f"{what}; {advice}" if advice else what)
        self.what = what


class RefusedError(ServerError):
    """The server answered that it will not; `status` is the HTTP status, 0 within a stream."""

    def __init__(self, message: str, status: int = 0) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class RunningServer:
    """Knows where a server is, without a trailing slash or `/v1`, and the key that it is shown."""

    url: str
    api_key: str | None = field(default=None, repr=False)

    @classmethod
    def at(cls, url: str, api_key: str | None = None) -> RunningServer:
        """Takes `host:port` too. Raises ConfigError for what is no address."""
        whole = url if "://" in url else f"http://{url}"
        try:
            parts = urlsplit(whole)
            is_address = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
        except ValueError:
            is_address = False
        if not is_address:
            raise ConfigError(f"--url {url} is no address; one looks like {DEFAULT_URL}")
        if api_key is not None and not re.fullmatch(r"[\x21-\x7e]+", api_key):
            raise ConfigError(f"--api-key (or {KEY_VARIABLE}) has characters that no key has")
        return cls(whole.rstrip("/").removesuffix("/v1"), api_key)

    def client(self, silence_s: float) -> httpx.Client:
        """Returns a client that waits so long for each piece. Proxies are for other machines."""
        is_here = is_loopback(urlsplit(self.url).hostname or "")
        key = {"authorization": f"Bearer {self.api_key}"} if self.api_key else {}
        return httpx.Client(
            base_url=self.url,
            headers=key,
            timeout=httpx.Timeout(silence_s, connect=CONNECT_S),
            trust_env=not is_here,
        )

    @contextmanager
    def translating(self) -> Iterator[None]:
        """Turns what httpx raises inside into an UnreachableError of one line."""
        try:
            yield
        except httpx.ConnectError as error:
            raise UnreachableError(
                f"nobody answers at {self.url} ({_reason(error)})",
                "`mlx-lm-server nano` starts a server, --url names another",
            ) from error
        except httpx.TimeoutException as error:
            raise UnreachableError(f"{self.url} is silent") from error
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise UnreachableError(f"{self.url}: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    """The system's words where there are some, else the library's, in one line."""
    found = re.match(r"\[Errno (-?\d+)\]", str(error))
    number = int(found.group(1)) if found else 0
    if number in errno.errorcode:
        return os.strerror(number).lower()
    words = re.sub(r"^\[Errno -?\d+\] ", "", str(error)) or type(error).__name__
    return " ".join(words.split())


def refusal(status: int, body: bytes) -> RefusedError:
    """Returns what an answer with a bad status says, in one line."""
    import msgspec

    try:
        value: Any = msgspec.json.decode(body)
    except msgspec.DecodeError:
        value = {}
    text = error_message(value["error"]) if isinstance(value, dict) and "error" in value else ""
    words = " ".join(text.split())[:MAX_MESSAGE] or "no reason is given"
    hint = "; --api-key KEY" if status == 401 else ""
    return RefusedError(f"{words} (HTTP {status}){hint}", status)
