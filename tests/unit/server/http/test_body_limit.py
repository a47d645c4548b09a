from __future__ import annotations

import asyncio

import pytest
from starlette.types import Message, Receive, Scope, Send

from mlx_lm_server.errors import RequestTimeoutError
from mlx_lm_server.server.http.body_limit import BodyLimit, read_all


async def _read_body(scope: Scope, receive: Receive, send: Send) -> None:
    await read_all(receive)


async def _send_nothing(_: Message) -> None:
    raise AssertionError("there is no answer")


async def test_the_whole_body_has_one_time_limit_however_many_parts_it_comes_in() -> None:
    num_parts = 0

    async def trickle() -> Message:
        nonlocal num_parts
        num_parts += 1
        await asyncio.sleep(0.02)
        return {"type": "http.request", "body": b"x", "more_body": num_parts < 20}

    limit = BodyLimit(_read_body, max_bytes=1000, timeout_s=0.1)
    with pytest.raises(RequestTimeoutError, match=r"within 0\.1 s"):
        await limit({"type": "http", "headers": []}, trickle, _send_nothing)
    assert 1 < num_parts < 20
