"""Where the server listens, and uvicorn as it is used here."""

from __future__ import annotations

import os
import resource
import socket
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import uvicorn
from starlette.types import ASGIApp

from mlx_lm_server.config import ServerConfig
from mlx_lm_server.errors import ConfigError, ServerError
from mlx_lm_server.server.http.connection import ConnectionLimits, bounded_protocol

# Longer than clients keep their idle connections, so that none is closed as it is used again.
KEEP_ALIVE_S = 75
# For connections that are open when everything else has ended.
LAST_BYTES_S = 2
# macOS refuses more than its kern.maxfilesperproc, which may be 10240.
OPEN_FILES = (65536, 49152, 24576, 10240, 4096, 1024)
# Leaves a new file what its owner may read and write.
ONLY_MINE = 0o177


@dataclass(frozen=True)
class Listener:
    """A bound socket and the address to show for it."""

    url: str
    socket: socket.socket


@contextmanager
def listen(server: ServerConfig) -> Iterator[Listener]:
    """Binds before anything is loaded: a port in use must not cost a download.

    Raises ServerError where that fails.
    """
    allow_many_files()
    if server.uds is not None:
        with _unix_socket(server.uds) as bound:
            yield Listener(f"unix:{server.uds}", bound)
        return
    family = socket.AF_INET6 if ":" in server.host else socket.AF_INET
    with socket.socket(family) as bound:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        _bind(bound, (server.host, server.port), f"{server.host}:{server.port}")
        scheme = "https" if server.ssl_certfile else "http"
        host = f"[{server.host}]" if family == socket.AF_INET6 else server.host
        yield Listener(f"{scheme}://{host}:{bound.getsockname()[1]}", bound)


@contextmanager
def _unix_socket(path: str) -> Iterator[socket.socket]:
    """Makes a socket file that is this user's alone from its first moment on, and gone with the
    server."""
    _remove_unused(path)
    with socket.socket(socket.AF_UNIX) as bound:
        mask = os.umask(ONLY_MINE)
        try:
            _bind(bound, path, path)
            bound.listen()  # from here on it is seen to be in use
        finally:
            os.umask(mask)
        try:
            yield bound
        finally:
            Path(path).unlink(missing_ok=True)


def _bind(bound: socket.socket, address: tuple[str, int] | str, shown: str) -> None:
    try:
        bound.bind(address)
    except OSError as error:
        reason = error.strerror or error
        raise ServerError(f"cannot listen on {shown}: {reason}") from error


def _remove_unused(path: str) -> None:
    """A socket that a dead server left behind is replaced; one that answers is not, nor a file."""
    if not os.path.lexists(path):
        return
    if not stat.S_ISSOCK(os.lstat(path).st_mode):
        raise ServerError(f"cannot listen on {path}: it is there already, and no socket")
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(path)
        except PermissionError as error:
            raise ServerError(f"cannot listen on {path}: it is another user's") from error
        except (ConnectionRefusedError, FileNotFoundError):
            with suppress(OSError):  # binding will fail then, and say why
                Path(path).unlink()
            return
        except OSError as error:  # a socket of another kind, say
            raise ServerError(f"cannot listen on {path}: {error.strerror}") from error
    raise ServerError(f"cannot listen on {path}: another server does")


class FileLimits(Protocol):
    """What `resource` knows of limits."""

    def getrlimit(self, which: int, /) -> tuple[int, int]: ...

    def setrlimit(self, which: int, limits: tuple[int, int], /) -> None: ...


def allow_many_files(limits: FileLimits = resource) -> None:
    """Asks for as many open files as the system grants, since each connection is one. macOS allows
    256 unless asked, names no upper limit, and refuses what is above the one that it has."""
    soft, hard = limits.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return
    most = OPEN_FILES[0] if hard == resource.RLIM_INFINITY else min(hard, OPEN_FILES[0])
    for wanted in (most, *(number for number in OPEN_FILES if number < most)):
        if wanted <= soft:
            return
        with suppress(OSError, ValueError):
            limits.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
            return


class HttpServer(uvicorn.Server):
    """Leaves the signals to us: a first one drains before the connections are closed."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def http_server(app: ASGIApp, server: ServerConfig, limits: ConnectionLimits) -> HttpServer:
    """Raises ConfigError for certificates that cannot be used."""
    config = uvicorn.Config(
        app,
        http=bounded_protocol(limits),
        ws="none",
        lifespan="off",
        access_log=False,
        log_config=None,
        server_header=False,
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=LAST_BYTES_S,
        ssl_certfile=server.ssl_certfile,
        ssl_keyfile=server.ssl_keyfile,
    )
    try:
        config.load()
    except OSError as error:
        raise ConfigError(f"--ssl-certfile, --ssl-keyfile: {error}") from error
    return HttpServer(config)
