"""The engine's end of the socket, over a real pair."""

from __future__ import annotations

import fcntl
import resource
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from mlx_lm_server.engine.engine_main import EngineLoop
from mlx_lm_server.engine.link import FRAME_WAIT_S, LinkClosed, ServerLink
from mlx_lm_server.protocol import Abort, AddRequest, SamplingParams, Shutdown, encode_frame

# What macOS gives a pair where nobody asks.
SMALL_BUFFER_BYTES = 8192
PROMPT_TOKENS = 32768
MANY_FILES = 1100


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, theirs = socket.socketpair()
    for end in (ours, theirs):
        for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
            end.setsockopt(socket.SOL_SOCKET, option, SMALL_BUFFER_BYTES)
    with ours, theirs:
        yield ours, theirs


@pytest.fixture
def request_frame() -> bytes:
    sampling = SamplingParams(max_tokens=1, seed=0)
    return encode_frame(AddRequest("r", [100_000 + i for i in range(PROMPT_TOKENS)], sampling))


class Counter:
    """A core with a row that decodes: each step takes a while, and gives nothing."""

    has_work = True
    waits_for_tier = False

    def __init__(self) -> None:
        self.num_steps = 0
        self.begun, self.has_arrived = threading.Event(), threading.Event()
        self.arrivals: dict[str, int] = {}

    def handle(self, messages: list[Any]) -> list[Any]:
        self.arrivals |= {message.req_id: self.num_steps for message in messages}
        if "r" in self.arrivals:
            self.has_arrived.set()
        return []

    def step_in_parts(self) -> list[Any]:
        self.num_steps += 1
        self.begun.set()
        time.sleep(0.005)
        return [[]]

    def stats(self) -> None:
        return None

    def take_step_tokens(self) -> list[int]:
        return []

    def close(self) -> None:
        pass


def test_a_long_prompt_arrives_within_two_steps(
    pair: tuple[socket.socket, socket.socket], request_frame: bytes
) -> None:
    server, engine = pair
    core = Counter()

    def send() -> None:
        core.begun.wait(10)
        server.sendall(encode_frame(Abort("before")))
        for start in range(0, len(request_frame), SMALL_BUFFER_BYTES):
            server.sendall(request_frame[start : start + SMALL_BUFFER_BYTES])
            time.sleep(0.0005)  # an event loop goes round
        core.has_arrived.wait(10)
        server.sendall(encode_frame(Shutdown()))

    sending = threading.Thread(target=send)
    sending.start()
    EngineLoop(ServerLink(engine), core).run([])  # type: ignore[arg-type]
    sending.join()
    assert core.arrivals["r"] - core.arrivals["before"] <= 2


def test_what_has_come_is_not_held_back_by_what_has_begun(
    pair: tuple[socket.socket, socket.socket], request_frame: bytes
) -> None:
    """A server may stop in the middle of a frame: rows go on after a moment, and the frame is
    whole when its rest comes."""
    server, engine = pair
    link = ServerLink(engine)
    server.sendall(encode_frame(Abort("early")) + request_frame[:1000])
    begun_s = time.monotonic()
    assert link.receive(0) == [Abort("early")]
    waited_s = time.monotonic() - begun_s
    assert FRAME_WAIT_S <= waited_s < 20 * FRAME_WAIT_S
    begun_s = time.monotonic()
    assert link.receive(0) == []
    assert time.monotonic() - begun_s < FRAME_WAIT_S, "nothing new: nothing to wait for"
    sending = threading.Thread(target=server.sendall, args=[request_frame[1000:]])
    sending.start()
    [message] = link.receive(10)
    sending.join()
    assert isinstance(message, AddRequest)
    assert len(message.prompt_ids) == PROMPT_TOKENS


def test_it_waits_for_a_first_message_and_notices_the_end(
    pair: tuple[socket.socket, socket.socket],
) -> None:
    server, engine = pair
    link = ServerLink(engine)
    begun_s = time.monotonic()
    assert link.receive(0.03) == []
    assert time.monotonic() - begun_s >= 0.03
    server.close()
    with pytest.raises(LinkClosed):
        link.receive(10)


def test_its_file_may_have_any_number(pair: tuple[socket.socket, socket.socket]) -> None:
    """An engine is started anew while its server has a thousand connections."""
    server, engine = pair
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < 2 * MANY_FILES:
        resource.setrlimit(resource.RLIMIT_NOFILE, (2 * MANY_FILES, hard))
    with socket.socket(fileno=fcntl.fcntl(engine, fcntl.F_DUPFD_CLOEXEC, MANY_FILES)) as high:
        link = ServerLink(high)
        server.sendall(encode_frame(Abort("r")))
        assert link.receive(10) == [Abort("r")]
