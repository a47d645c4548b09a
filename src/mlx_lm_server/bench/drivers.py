"""Send the calls of a plan in the order and at the times the plan asks for."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import singledispatch

from mlx_lm_server.bench.client import Call, Client
from mlx_lm_server.bench.plans import ClosedLoop, Conversation, Newcomers, SharedPrefix
from mlx_lm_server.bench.trace import Trace

POLL_S = 0.005
WARM_EVENTS = 24
# Of each decoder after the newcomers: a machine's speed may change while they are there.
CALM_EVENTS = 24
SETTLE_S = 0.3


@singledispatch
async def drive(plan: object, client: Client) -> None:
    """Run the plan to its end; the client keeps the traces."""
    raise TypeError(f"no driver for {type(plan).__name__}")


@drive.register
async def _(plan: ClosedLoop, client: Client) -> None:
    await asyncio.gather(*(_one_by_one(calls, client) for calls in plan.clients))


async def _one_by_one(calls: tuple[Call, ...], client: Client) -> None:
    for call in calls:
        await client.send(call)


@drive.register
async def _(plan: Newcomers, client: Client) -> None:
    await _one_by_one(plan.idle, client)
    async with _background(plan.decoders, plan.beside, client) as decoders:
        for pause_s, call in plan.busy:
            await asyncio.sleep(pause_s)
            await client.send(call)
        await _until_each_has_more(decoders, CALM_EVENTS)
    await asyncio.sleep(SETTLE_S)


@drive.register
async def _(plan: SharedPrefix, client: Client) -> None:
    await client.send(plan.first)
    await asyncio.gather(*(client.send(call) for call in plan.others))


@drive.register
async def _(plan: Conversation, client: Client) -> None:
    messages = [{"role": "system", "content": plan.system}]
    for user in plan.turns:
        messages.append({"role": "user", "content": user})
        trace = await client.send(plan.call(messages))
        if trace.error is not None:
            return
        messages.append({"role": "assistant", "content": trace.text})


class _Decoder:
    """A client that always has a request running; a new one begins where one ends."""

    def __init__(self, source: Callable[[], Call], client: Client) -> None:
        self._source = source
        self._client = client
        self.trace: Trace
        self.task = asyncio.create_task(self._run())

    async def _run(self) -> None:
        while True:
            self.trace, task = self._client.start(self._source())
            await task
            if self.trace.error is not None:
                return

    def has_events(self, num_events: int) -> bool:
        """Also true of one that failed: nothing more will come of it."""
        return self.task.done() or len(self.trace.event_times) >= num_events


@asynccontextmanager
async def _background(
    source: Callable[[], Call], num_decoders: int, client: Client
) -> AsyncIterator[list[_Decoder]]:
    """`num_decoders` decoders that all decode when the block begins and end with it."""
    decoders = [_Decoder(source, client) for _ in range(num_decoders)]
    try:
        await asyncio.sleep(0)
        await _until(lambda: all(d.has_events(WARM_EVENTS) for d in decoders))
        yield decoders
    finally:
        for decoder in decoders:
            decoder.task.cancel()
        await asyncio.wait([decoder.task for decoder in decoders])


async def _until_each_has_more(
    decoders: list[_Decoder], num_events: int, limit_s: float = 10.0
) -> None:
    """Let each decoder show more tokens or end its answer, so that an open gap is seen whole."""
    due = [(d, d.trace, len(d.trace.event_times) + num_events) for d in decoders]
    try:
        async with asyncio.timeout(limit_s):
            await _until(lambda: all(d.trace is not t or d.has_events(n) for d, t, n in due))
    except TimeoutError:
        return


async def _until(condition: Callable[[], bool]) -> None:
    """Looks now and then: waking someone for each token would cost more, and it is not timed."""
    while not condition():  # noqa: ASYNC110
        await asyncio.sleep(POLL_S)
