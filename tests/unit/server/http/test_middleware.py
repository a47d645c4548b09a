from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from starlette.types import Message, Receive, Scope, Send

from mlx_lm_server.server.http.middleware import Border


async def _answer(scope: Scope, receive: Receive, send: Send) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})


async def _nothing_comes() -> Message:
    raise AssertionError("nobody reads the request")


@pytest.mark.parametrize(
    ("given", "is_kept"),
    [(b"x" * 128, True), (b"x" * 129, False), (b"a b", False), (b"\xc3\xa4", False), (b"", False)],
    ids=["longest", "too long", "space", "no ASCII", "empty"],
)
async def test_the_clients_request_id_is_told_where_it_is_short_and_plain(
    given: bytes, is_kept: bool
) -> None:
    sent: list[Any] = []

    async def send(message: Message) -> None:
        sent.append(message)

    scope = {"type": "http", "headers": [(b"x-request-id", given)]}
    await Border(_answer, Counter())(scope, _nothing_comes, send)
    told = dict(sent[0]["headers"])[b"x-request-id"]
    assert (told == given) == is_kept
    assert is_kept or len(told) == 32
