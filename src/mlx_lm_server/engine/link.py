"""The engine's end of the socket to its server."""

from __future__ import annotations

import select
import socket

from mlx_lm_server.protocol import (
    LENGTH,
    MAX_FRAME_BYTES,
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
        self._received = bytearray()

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
        while select.select([self._connection], [], [], 0 if messages else wait_s)[0]:
            self._fill()
            messages += self._take_frames()
            wait_s = 0
        return messages

    def _fill(self) -> None:
        try:
            data = self._connection.recv(RECEIVE_BYTES)
        except OSError as error:
            raise LinkClosed from error
        if not data:
            raise LinkClosed
        self._received += data

    def _take_frames(self) -> list[ToEngine]:
        frames = []
        start = 0
        while len(self._received) - start >= LENGTH.size:
            (length,) = LENGTH.unpack_from(self._received, start)
            if length > MAX_FRAME_BYTES:
                raise LinkClosed(f"a frame of {length} bytes")
            end = start + LENGTH.size + length
            if len(self._received) < end:
                break
            frames.append(decode_to_engine(bytes(self._received[start + LENGTH.size : end])))
            start = end
        del self._received[:start]
        return frames
