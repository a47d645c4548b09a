from __future__ import annotations

import asyncio

import uvicorn
from starlette.types import Receive, Scope, Send
from uvicorn.server import ServerState

from mlx_lm_server.server.http.connection import BoundedProtocol, ConnectionLimits


class Link(asyncio.Transport):
    """Takes what is written and notes whether it was cut off."""

    def __init__(self) -> None:
        super().__init__()
        self.is_cut_off = False

    def abort(self) -> None:
        self.is_cut_off = True

    def close(self) -> None:
        pass

    def is_closing(self) -> bool:
        return self.is_cut_off

    def write(self, data: bytes | bytearray | memoryview) -> None:
        pass


async def _app(scope: Scope, receive: Receive, send: Send) -> None:
    raise AssertionError("no request comes")


def _connected(write_s: float) -> tuple[BoundedProtocol, Link]:
    limits = ConnectionLimits(write_s=write_s)
    protocol = BoundedProtocol(
        limits, config=uvicorn.Config(_app), server_state=ServerState(), app_state={}
    )
    link = Link()
    protocol.connection_made(link)
    return protocol, link


async def test_a_client_that_pauses_is_cut_off_only_where_it_does_not_read_on() -> None:
    (slow, slow_link), (gone, gone_link) = _connected(0.05), _connected(0.05)
    slow.pause_writing()
    gone.pause_writing()
    slow.resume_writing()
    await asyncio.sleep(0.1)
    assert gone_link.is_cut_off
    assert not slow_link.is_cut_off
    for protocol in (slow, gone):
        protocol.connection_lost(None)
