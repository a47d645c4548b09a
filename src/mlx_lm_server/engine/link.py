"""The engine's end of the socket to its server."""

from __future__ import annotations

import select
import socket
import time

from mlx_lm_server.protocol import (
    FrameBuffer,
    FrameError,
    Message,
    ToEngine,
    decode_to_engine,
    encode_frame,
)

RECEIVE_BYTES = 1 << 20
# How long the rest of a frame is waited for. Where a socket holds 8 KiB, a prompt of 32 000 tokens
# comes in 20 pieces within milliseconds, and a step after each would make that 20 steps. A server
# that is held up does not hold up the rows.
FRAME_WAIT_S = 0.05


class LinkClosed(Exception):
    """The server closed the socket or is gone."""


class ServerLink:
    """Frames in and out. Used on the engine's main thread only."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._frames = FrameBuffer()
        self._arrivals = select.poll()  # select() knows only the first 1024 files of a process
        self._arrivals.register(connection, select.POLLIN)

    def send(self, message: Message) -> None:
        """Raises LinkClosed."""
        try:
            self._connection.sendall(encode_frame(message))
        except OSError as error:
            raise LinkClosed from error

    def receive(self, wait_s: float) -> list[ToEngine]:
        """Returns the messages that are there, after waiting up to `wait_s` for a first one, and a
        moment for the rest of one that has begun. Raises LinkClosed."""
        messages: list[ToEngine] = []
        ends_s: float | None = None
        while self._arrivals.poll(wait_s * 1000):
            messages += self._read()
            ends_s = time.monotonic() + FRAME_WAIT_S if ends_s is None else ends_s
            wait_s = max(0.0, ends_s - time.monotonic()) if self._frames.has_begun else 0.0
        return messages

    def _read(self) -> list[ToEngine]:
        try:
            data = self._connection.recv(RECEIVE_BYTES)
            bodies = self._frames.feed(data)
        except (OSError, FrameError) as error:
            raise LinkClosed from error
        if not data:
            raise LinkClosed
        return [decode_to_engine(body) for body in bodies]
