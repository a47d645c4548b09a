from __future__ import annotations

import asyncio
import socket
import time

import pytest
from fake_openai import CACHED_TOKENS, FakeServer, until

from mlx_lm_server.bench.client import Call, Client, Target, encode_request, http_error
from mlx_lm_server.bench.sse import DataLines
from mlx_lm_server.bench.trace import Trace

CALL = Call("client", "/v1/completions", 8, {"prompt": " one two three", "temperature": 0.0})
CHAT = Call("turn", "/v1/chat/completions", 4, {"messages": [{"role": "user", "content": "a b"}]})


async def ask(target: Target, call: Call = CALL, silence_s: float = 10.0) -> Trace:
    return await Client(target, silence_s=silence_s).send(call)


async def test_a_stream_is_timed_and_counted(server: FakeServer) -> None:
    trace = await ask(server.target())
    assert trace.error is None
    assert trace.finish_reason == "length"
    assert trace.text == "".join(f" w{i}" for i in range(8))
    assert (trace.prompt_tokens, trace.completion_tokens) == (9, 8)
    assert trace.cached_tokens == CACHED_TOKENS
    assert len(trace.event_times) == 8
    assert trace.sent_at < trace.event_times[0] < trace.event_times[-1] < (trace.ended_at or 0)


async def test_the_role_chunk_of_a_chat_is_no_token(server: FakeServer) -> None:
    trace = await ask(server.target(), CHAT)
    assert len(trace.event_times) == 4
    assert trace.text == " w0 w1 w2 w3"


async def test_what_is_sent_names_model_and_key_where_given_only(server: FakeServer) -> None:
    await ask(server.target())
    await ask(Target(f"{server.url}/v1/", "some", "secret"))
    assert "model" not in server.bodies[0]
    assert server.bodies[1]["model"] == "some"
    assert server.bodies[1]["stream_options"] == {"include_usage": True}
    assert server.authorizations == [None, "Bearer secret"]


async def test_without_usage_the_events_are_counted(server: FakeServer) -> None:
    trace = await ask(server.target("counts-nothing"))
    assert trace.completion_tokens is None
    assert trace.output_tokens == 8


@pytest.mark.parametrize(
    ("model", "error"),
    [
        ("refuses", "HTTP 404: no such model"),
        ("breaks", "HTTP 500: oh no"),
        ("fails", "error event: engine died"),
        ("truncates", "the stream ended without [DONE]"),
    ],
)
async def test_errors_are_told_as_the_server_tells_them(
    server: FakeServer, model: str, error: str
) -> None:
    trace = await ask(server.target(model))
    assert trace.error == error
    assert trace.ended_at is not None


async def test_a_stalled_stream_ends_after_the_silence_allowed(server: FakeServer) -> None:
    trace = await ask(server.target("stalls"), silence_s=0.3)
    assert trace.error == "stalled: nothing came for 0.3 s"
    assert len(trace.event_times) == 3
    await until(lambda: server.num_disconnects == 1)


async def test_a_slow_but_steady_stream_is_not_stalled(server: FakeServer) -> None:
    call = Call("client", "/v1/completions", 300, {"prompt": " a"})
    trace = await ask(server.target(), call, silence_s=0.2)
    assert trace.error is None
    assert (trace.e2e_s or 0) > 0.2


async def test_a_client_that_was_held_up_itself_gives_the_server_its_time_again(
    server: FakeServer,
) -> None:
    trace, task = Client(server.target("stalls"), silence_s=0.3).start(CALL)
    await until(lambda: len(trace.event_times) == 3)
    time.sleep(1.0)  # noqa: ASYNC251
    resumed_at = time.perf_counter()
    await task
    assert trace.error == "stalled: nothing came for 0.3 s"
    assert trace.ended_at is not None
    assert trace.ended_at - resumed_at > 0.25


async def test_a_request_that_is_cancelled_while_it_connects_has_no_error(
    server: FakeServer,
) -> None:
    client = Client(server.target())
    for num_turns in range(12):  # of the event loop, somewhere within connecting
        _, task = client.start(CALL)
        for _ in range(num_turns):
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait([task])
        await asyncio.sleep(0.01)
    assert [trace.error for trace in client.traces if trace.error] == []
    assert sum(trace.was_stopped for trace in client.traces) > 3


async def test_a_cancelled_request_is_stopped_and_the_server_sees_it(server: FakeServer) -> None:
    trace, task = Client(server.target("stalls")).start(CALL)
    await until(lambda: len(trace.event_times) == 3)
    task.cancel()
    await asyncio.wait([task])
    assert trace.was_stopped
    assert trace.error is None
    await until(lambda: server.num_disconnects == 1)


async def test_nobody_listening_is_an_error_of_the_trace() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    trace = await ask(Target(f"http://127.0.0.1:{port}"))
    assert (trace.error or "").startswith("no connection")


async def raw_answer(answer: bytes) -> Trace:
    """What the client makes of these bytes, after which the server closes the connection."""

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(answer)
        await writer.drain()
        writer.close()

    async with await asyncio.start_server(handle, "127.0.0.1", 0) as listener:
        port = listener.sockets[0].getsockname()[1]
        return await ask(Target(f"http://127.0.0.1:{port}"))


async def test_a_stream_without_length_ends_with_its_connection() -> None:
    events = b'data: {"choices": [{"text": "a"}]}\n\ndata: [DONE]\n\n'
    trace = await raw_answer(b"HTTP/1.0 200 OK\r\nContent-Type: text/event-stream\r\n\r\n" + events)
    assert trace.error is None
    assert trace.text == "a"


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (b"", "the connection closed without a response"),
        (b"I am no HTTP\r\n\r\n", "malformed HTTP"),
        (b"HTTP/1.0 200 OK\r\n\r\ndata: {]\n\n", "not a chunk"),
        (b"HTTP/1.0 200 OK\r\n\r\n", "the stream ended without [DONE]"),
    ],
)
async def test_nonsense_is_an_error_of_the_trace(answer: bytes, error: str) -> None:
    assert ((await raw_answer(answer)).error or "").startswith(error)


def test_data_lines_do_not_depend_on_how_the_bytes_are_cut() -> None:
    stream = b'data: {"a": 1}\r\n\r\n: comment\n\nevent: x\ndata:two\n\ndata: [DONE]\n\n'
    for size in range(1, len(stream) + 1):
        lines = DataLines()
        pieces = (stream[i : i + size] for i in range(0, len(stream), size))
        payloads = [payload for piece in pieces for payload in lines.feed(piece)]
        assert payloads == [b'{"a": 1}', b"two", b"[DONE]"]


def test_a_target_is_read_from_its_url() -> None:
    target = Target("https://example.org/api/v1")
    assert (target.host, target.port, target.is_tls) == ("example.org", 443, True)
    assert encode_request(target, CALL).startswith(b"POST /api/v1/completions HTTP/1.1\r\n")


def test_an_ipv6_host_is_named_in_brackets() -> None:
    assert b"\r\nHost: [::1]:8000\r\n" in encode_request(Target("http://[::1]:8000"), CALL)


@pytest.mark.parametrize("body", [b"plain", b"[1]", b'{"error": "plain"}', b'{"error": {"x": 1}}'])
def test_an_error_of_any_shape_has_a_text(body: bytes) -> None:
    assert http_error(400, body).startswith("HTTP 400: ")
