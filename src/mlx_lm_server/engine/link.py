"""The engine's end of the socket to its server."""

from __future__ import annotations

import select
import socket

from mlx_lm_server.protocol import (
    FrameBuffer,
    FrameError,
    Message,
    ToEngine,
    decode_to_engine,
    encode_frame,
)

RECEIVE_BYTES = 1 << 20


class LinkClosed(Exception):
    """The server closed the socket or is gone."""


class ServerLink:
    """Frames in and out. Used on the engine's main thread only."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._frames = FrameBuffer()

    def send(self, message: Message) -> None:
        """Raises LinkClosed."""
        try:
            self._connection.sendall(encode_frame(message))
        except OSError as error:
            raise LinkClosed from error

    def receive(self, wait_s: float) -> list[ToEngine]:
        """The messages that are there, after waiting up to `wait_s` for a first one. Raises
        LinkClosed."""
        messages: list[ToEngine] = []
        while select.select([self._connection], [], [], wait_s)[0]:
            messages += self._read()
            wait_s = 0
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
