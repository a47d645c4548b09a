"""An engine's process, and how wide the socket to it is."""

from __future__ import annotations

import asyncio
import errno
import socket
import sys

import pytest

from mlx_lm_server.protocol import LoadProgress, ToServer
from mlx_lm_server.server.engines.engine_process import (
    LEAST_BUFFER_BYTES,
    WANTED_BUFFER_BYTES,
    EngineProcess,
    wide_pair,
    widen,
)

BUFFERS = (socket.SO_SNDBUF, socket.SO_RCVBUF)
TELLS_ITS_BUFFERS = """
import socket, sys
from mlx_lm_server.protocol import LoadProgress, encode_frame
end = socket.socket(fileno=int(sys.argv[sys.argv.index("--fd") + 1]))
for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
    size = end.getsockopt(socket.SOL_SOCKET, option)
    end.sendall(encode_frame(LoadProgress("buffer", float(size))))
end.recv(1)
"""


class StrictSocket:
    """Grants what it is asked for, up to a limit, and nothing beyond: as macOS does."""

    def __init__(self, most_bytes: int, has_bytes: int = 8192) -> None:
        self._most_bytes = most_bytes
        self.sizes = dict.fromkeys(BUFFERS, has_bytes)

    def getsockopt(self, _level: int, option: int, /) -> int:
        return self.sizes[option]

    def setsockopt(self, _level: int, option: int, value: int, /) -> None:
        if value > self._most_bytes:
            raise OSError(errno.ENOBUFS, "No buffer space available")
        self.sizes[option] = value


@pytest.mark.parametrize(
    ("most_bytes", "gets_bytes"),
    [
        (8 << 20, WANTED_BUFFER_BYTES),
        (WANTED_BUFFER_BYTES, WANTED_BUFFER_BYTES),
        (300_000, 1 << 18),
        (LEAST_BUFFER_BYTES, LEAST_BUFFER_BYTES),
        (8192, 8192),
    ],
)
def test_buffers_are_as_wide_as_the_system_grants(most_bytes: int, gets_bytes: int) -> None:
    strict = StrictSocket(most_bytes)
    widen(strict)
    assert strict.sizes == dict.fromkeys(BUFFERS, gets_bytes)


def test_wide_buffers_are_left_as_they_are() -> None:
    wide = StrictSocket(8 << 20, has_bytes=4 << 20)
    widen(wide)
    assert wide.sizes == dict.fromkeys(BUFFERS, 4 << 20)


def test_both_ends_of_a_pair_are_wide() -> None:
    narrow = socket.socketpair()
    wide = wide_pair()
    for before, after in zip(narrow, wide, strict=True):
        with before, after:
            for option in BUFFERS:
                had = before.getsockopt(socket.SOL_SOCKET, option)
                has = after.getsockopt(socket.SOL_SOCKET, option)
                assert has >= min(2 * had, WANTED_BUFFER_BYTES)


async def test_an_engine_gets_one_end_of_a_wide_pair() -> None:
    told: list[float] = []
    has_told = asyncio.Event()

    def take(message: ToServer) -> None:
        assert isinstance(message, LoadProgress)
        told.append(message.fraction)
        if len(told) == len(BUFFERS):
            has_told.set()

    process = EngineProcess(take, lambda: None)
    await process.start([sys.executable, "-c", TELLS_ITS_BUFFERS])
    try:
        await asyncio.wait_for(has_told.wait(), 20)
    finally:
        process.kill()
        await process.wait(5)
    ours, theirs = wide_pair()
    with ours, theirs:
        assert told == [theirs.getsockopt(socket.SOL_SOCKET, option) for option in BUFFERS]
