"""One engine process and the socket to it."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import subprocess
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Protocol, cast

import msgspec

from mlx_lm_server.protocol import (
    FrameBuffer,
    FrameError,
    Message,
    ToServer,
    decode_to_server,
    encode_frame,
)
from mlx_lm_server.step_note import StepNote, open_note

log = logging.getLogger(__name__)

# A prompt of 200 000 tokens. macOS gives a socket pair 8 KiB where nobody asks.
WANTED_BUFFER_BYTES = 1 << 20
LEAST_BUFFER_BYTES = 1 << 14

# glibc then backs the engine's arrays with huge pages: some 5 % of a decode step on a Linux CPU.
ENGINE_ENVIRONMENT = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}


class BufferedSocket(Protocol):
    """What is asked of a socket about its buffers."""

    def getsockopt(self, level: int, option: int, /) -> int: ...

    def setsockopt(self, level: int, option: int, value: int, /) -> None: ...


def widen(connection: BufferedSocket) -> None:
    """Asks for buffers that hold a long prompt, or as much of one as the system grants."""
    for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
        wanted = WANTED_BUFFER_BYTES
        while (
            wanted >= LEAST_BUFFER_BYTES
            and connection.getsockopt(socket.SOL_SOCKET, option) < wanted
        ):
            with suppress(OSError):  # ENOBUFS: macOS grants all or nothing, Linux what it may
                connection.setsockopt(socket.SOL_SOCKET, option, wanted)
                break
            wanted //= 2


def wide_pair() -> tuple[socket.socket, socket.socket]:
    """Returns a socket pair in which a frame waits whole for the other side to read it."""
    pair = socket.socketpair()
    for end in pair:
        widen(end)
    return pair


class EngineProcess(asyncio.Protocol):
    """Owned by the supervisor, or by its standby, who then hands it over: `on_message` and
    `on_lost` may be set anew. They run on the event loop; after `on_lost` nothing more comes. The
    engine is in a session of its own, so that Ctrl-C in a terminal reaches only the server, which
    drains it."""

    def __init__(self, on_message: Callable[[ToServer], None], on_lost: Callable[[], None]) -> None:
        self.on_message = on_message
        self.on_lost = on_lost
        self._note: StepNote | None = None
        self._frames = FrameBuffer()
        self._transport: asyncio.Transport | None = None
        self._popen: subprocess.Popen[bytes] | None = None

    async def start(self, command: Sequence[str]) -> None:
        """Spawns `command --fd N --note-fd M`. Raises OSError where that fails."""
        note_fd = open_note()
        self._note = StepNote(os.dup(note_fd))
        ours, theirs = wide_pair()
        try:
            self._popen = subprocess.Popen(  # noqa: ASYNC220 - spawning takes a millisecond
                [*command, "--fd", str(theirs.fileno()), "--note-fd", str(note_fd)],
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno(), note_fd],
                env=ENGINE_ENVIRONMENT | os.environ,
                start_new_session=True,
            )
        except OSError:
            ours.close()
            raise
        finally:
            theirs.close()
            os.close(note_fd)
        ours.setblocking(False)
        await asyncio.get_running_loop().create_connection(lambda: self, sock=ours)

    @property
    def pid(self) -> int | None:
        return self._popen.pid if self._popen else None

    @property
    def exit_code(self) -> int | None:
        return self._popen.poll() if self._popen else None

    def rows_under_way(self) -> set[str] | None:
        """Returns whose steps were under way, of an engine that has ended; None where it could not
        tell. Nothing more is asked of it after that."""
        if self._note is None:
            return None
        found = self._note.read()
        self._note.close()
        self._note = None
        return found

    def send(self, message: Message) -> None:
        """Queues a message; one to an engine that is gone is lost, as its death will tell."""
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(encode_frame(message))

    def kill(self) -> None:
        if self._popen is not None and self._popen.poll() is None:
            os.kill(self._popen.pid, signal.SIGKILL)
        if self._transport is not None:
            self._transport.abort()

    async def wait(self, limit_s: float) -> bool:
        """Tells whether the process has ended within `limit_s`."""
        deadline_s = asyncio.get_running_loop().time() + limit_s
        while self.exit_code is None:
            if asyncio.get_running_loop().time() > deadline_s:
                return False
            await asyncio.sleep(0.01)
        return True

    # asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        try:
            for body in self._frames.feed(data):
                self.on_message(decode_to_server(body))
        except (FrameError, msgspec.MsgspecError) as error:
            log.error("the engine sent what is no message (%s); it is ended", error)
            self.kill()

    def connection_lost(self, exc: Exception | None) -> None:
        self.on_lost()
