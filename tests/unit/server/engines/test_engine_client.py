"""Whatever happens, each sequence ends exactly once, and the engine is told when to stop."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterable
from typing import Any, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from mlx_lm_server.errors import (
    ClientGoneError,
    EngineDiedError,
    EngineError,
    EngineUnavailableError,
    OverloadedError,
    RequestTimeoutError,
    ServerError,
)
from mlx_lm_server.protocol import (
    Abort,
    AddRequest,
    CacheReport,
    EngineStats,
    Message,
    Outputs,
    RequestOutput,
    SamplingParams,
)
from mlx_lm_server.server.answers.generate_request import Delta, GenerateRequest
from mlx_lm_server.server.engines import engine_client
from mlx_lm_server.server.engines.engine_client import EngineClient
from mlx_lm_server.server.engines.generation import Generation
from mlx_lm_server.server.engines.metrics import Metrics
from mlx_lm_server.server.engines.output_stream import Mailbox
from mlx_lm_server.server.models.tokenizer import Tokenizer

STATS = EngineStats(*[0] * 13)


class Letters:
    """Id 0 is a, 1 is b …"""

    def push(self, ids: Iterable[int]) -> str:
        return "".join(chr(ord("a") + i % 26) for i in ids)

    def flush(self) -> str:
        return ""


class LetterTokenizer:
    def detokenizer(self, visible_ids: frozenset[int] = frozenset()) -> Letters:
        return Letters()


class Scene:
    """A client with an engine that is a list of what it was sent."""

    def __init__(self, **timeouts: float) -> None:
        self.metrics = Metrics("m")
        self.now_s = 0.0
        self.num_row_ends = 0
        limits = {"first_token_timeout_s": 0.0, "token_timeout_s": 0.0, **timeouts}
        self.client = EngineClient(
            self.metrics, on_row_end=self._count_row_end, clock=lambda: self.now_s, **limits
        )
        self.sent: list[Message] = []
        self.client.attach(self.sent.append)
        self.done: list[Generation] = []

    def _count_row_end(self) -> None:
        self.num_row_ends += 1

    def generate(
        self,
        num_sequences: int = 1,
        stop: tuple[str, ...] = (),
        prompt_ids: tuple[int, ...] = (1, 2),
        stop_token_ids: tuple[int, ...] = (),
    ) -> Generation:
        sampling = SamplingParams(max_tokens=9, seed=1, stop_token_ids=stop_token_ids)
        request = GenerateRequest(list(prompt_ids), sampling, stop_strings=stop)
        return Generation(
            f"r{len(self.sent)}",
            [request] * num_sequences,
            client=self.client,
            tokenizer=cast(Tokenizer, LetterTokenizer()),
            metrics=self.metrics,
            arrival_s=0.0,
            on_done=self.done.append,
        )

    def say(self, *outputs: RequestOutput) -> None:
        self.client.on_outputs(Outputs(list(outputs), STATS))

    def ids(self) -> list[str]:
        return [message.req_id for message in self.sent if isinstance(message, AddRequest)]

    def aborted(self) -> list[str]:
        return [message.req_id for message in self.sent if isinstance(message, Abort)]


async def test_tokens_of_one_step_come_together() -> None:
    scene = Scene()
    generation = scene.generate(num_sequences=2)
    a, b = scene.ids()
    scene.say(RequestOutput(a, [0]), RequestOutput(b, [1, 2], "length"))
    assert await generation.next() == [Delta(0, "a"), Delta(1, "bc", "length")]
    assert not generation.is_done
    scene.say(RequestOutput(a, [], "stop"))
    assert await generation.next() == [Delta(0, "", "stop")]
    assert generation.is_done
    assert scene.client.num_live == 0
    usage = generation.usage()
    assert (usage.prompt_tokens, usage.completion_tokens) == (4, 3)


async def test_each_row_that_ends_is_told_once() -> None:
    scene = Scene()
    generation = scene.generate(num_sequences=3)
    a, b, c = scene.ids()
    scene.say(RequestOutput(a, [0]), RequestOutput(b, [1], "length"))
    scene.say(RequestOutput(a, [0], "stop"), RequestOutput(c, [1]))
    assert scene.num_row_ends == 2
    generation.cancel(ClientGoneError("left"))
    assert scene.num_row_ends == 2, "the engine still has the row"
    scene.say(RequestOutput(c, [], "abort"))
    assert scene.num_row_ends == 3


async def test_the_engine_is_told_where_the_first_and_the_last_messages_end() -> None:
    scene = Scene()
    scene.generate(prompt_ids=(1, 9, 2, 9, 3, 8, 4, 9, 5, 9, 6), stop_token_ids=(8, 9))
    [request] = scene.sent
    assert isinstance(request, AddRequest)
    assert request.message_ends == [2, 6, 8, 10]


async def test_the_pace_of_decoding_counts_the_tokens_after_the_first() -> None:
    scene = Scene()
    generation = scene.generate(num_sequences=2)
    a, b = scene.ids()
    scene.now_s = 2.0
    scene.say(RequestOutput(a, [0]), RequestOutput(b, [0]))
    scene.now_s = 4.0
    scene.say(RequestOutput(a, [0, 0, 0], "length"), RequestOutput(b, [0, 0, 0], "length"))
    await generation.next()
    timings = generation.timings()
    assert (timings.ttft_s, timings.total_s) == (2.0, 4.0)
    assert timings.decode_tokens_per_s == 3.0


async def test_a_stop_string_aborts_the_row_and_what_comes_later_is_dropped() -> None:
    scene = Scene()
    generation = scene.generate(stop=("b",))
    [req_id] = scene.ids()
    scene.say(RequestOutput(req_id, [0, 1, 2]))
    assert await generation.next() == [Delta(0, "a", "stop", "b")]
    assert scene.aborted() == [req_id]
    assert scene.client.num_live == 1, "its row is the engine's until the engine says so"
    scene.say(RequestOutput(req_id, [3], "abort"))
    assert scene.client.num_live == 0


async def test_an_error_comes_after_the_tokens_before_it() -> None:
    scene = Scene()
    generation = scene.generate()
    [req_id] = scene.ids()
    scene.say(RequestOutput(req_id, [0]))
    scene.client.give_up(EngineDiedError("dead"))
    assert await generation.next() == [Delta(0, "a")]
    with pytest.raises(EngineDiedError):
        await generation.next()
    assert generation.is_done


async def test_without_an_engine_nothing_is_submitted() -> None:
    scene = Scene()
    scene.client.give_up(EngineDiedError("dead"))
    with pytest.raises(EngineUnavailableError):
        scene.generate()
    assert scene.client.num_live == 0


async def test_one_sequence_that_fails_ends_the_others_of_its_request() -> None:
    scene = Scene()
    generation = scene.generate(num_sequences=3)
    first, second, third = scene.ids()
    scene.say(RequestOutput(second, [], "error", error="boom"))
    with pytest.raises(EngineError, match="boom"):
        await generation.next()
    assert generation.is_done
    assert scene.aborted() == [first, third]


async def test_a_reader_that_waits_learns_of_a_cancellation() -> None:
    scene = Scene()
    generation = scene.generate()
    reading = asyncio.create_task(generation.next())
    await asyncio.sleep(0)
    generation.cancel(ClientGoneError("left"))
    with pytest.raises(ClientGoneError):
        await reading
    assert scene.aborted() == scene.ids()
    assert scene.metrics.finished == {"abort": 1}


async def test_an_unread_stream_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_client, "MAX_UNREAD_TOKENS", 10)
    scene = Scene()
    generation = scene.generate()
    [req_id] = scene.ids()
    scene.say(RequestOutput(req_id, [0] * 11))
    assert scene.aborted() == [req_id]
    await generation.next()
    with pytest.raises(OverloadedError):
        await generation.next()


async def test_time_limits() -> None:
    scene = Scene(first_token_timeout_s=10.0, token_timeout_s=5.0)
    generation = scene.generate()
    [req_id] = scene.ids()
    began_s = generation._streams[0].last_token_s
    scene.client.expire(began_s + 9)
    assert scene.aborted() == []
    scene.say(RequestOutput(req_id, [0]))
    scene.client.expire(generation._streams[0].last_token_s + 4)
    assert scene.aborted() == []
    scene.client.expire(generation._streams[0].last_token_s + 6)
    assert scene.aborted() == [req_id]
    await generation.next()
    with pytest.raises(RequestTimeoutError):
        await generation.next()


async def test_a_prompt_that_comes_further_has_not_waited_for_its_first_token() -> None:
    scene = Scene(first_token_timeout_s=10.0, token_timeout_s=5.0)
    generation = scene.generate()
    [req_id] = scene.ids()
    for now_s in (9.0, 18.0):
        scene.now_s = now_s
        scene.say(RequestOutput(req_id, [], num_computed_tokens=1))
        scene.client.expire(now_s + 9)
    assert scene.aborted() == []
    scene.client.expire(28.5)
    assert scene.aborted() == [req_id]
    with pytest.raises(RequestTimeoutError, match="no first token within 10 s"):
        await generation.next()


async def test_time_limits_stand_still_while_no_engine_runs() -> None:
    scene = Scene(first_token_timeout_s=10.0, token_timeout_s=5.0)
    scene.generate()
    [req_id] = scene.ids()
    scene.say(RequestOutput(req_id, [0]))
    scene.now_s = 4.0
    scene.client.detach("signal 9", [req_id])
    scene.client.expire(500.0)
    scene.now_s = 1000.0
    scene.client.attach(scene.sent.append)
    scene.client.expire(1000.5)
    assert scene.aborted() == []
    scene.client.expire(1001.5)
    assert scene.aborted() == [req_id]


async def test_the_next_engine_is_given_the_tokens_that_were_told() -> None:
    scene = Scene()
    generation = scene.generate()
    [req_id] = scene.ids()
    scene.say(RequestOutput(req_id, [0, 1]))
    scene.client.detach("signal 9", [req_id])
    scene.client.attach(scene.sent.append)
    again = scene.sent[-1]
    assert isinstance(again, AddRequest)
    assert again.output_ids == [0, 1]
    scene.say(RequestOutput(req_id, [2], "length"))
    [delta] = await generation.next()
    assert (delta.text, delta.finish_reason, delta.num_resumed) == ("abc", "length", 1)
    assert generation.usage().num_resumed == 1
    assert scene.metrics.resumed_requests == 1


async def test_who_comes_while_no_engine_runs_waits_for_the_next_one() -> None:
    scene = Scene()
    scene.client.detach("signal 9")
    generation = scene.generate()
    assert scene.ids() == []
    scene.client.attach(scene.sent.append)
    [req_id] = scene.ids()
    scene.say(RequestOutput(req_id, [0], "length"))
    assert await generation.next() == [Delta(0, "a", "length")]
    assert scene.metrics.resumed_requests == 0


async def test_who_leaves_while_no_engine_runs_gives_its_place_back() -> None:
    scene = Scene()
    generation = scene.generate()
    scene.client.detach("signal 9")
    generation.cancel(ClientGoneError("left"))
    assert scene.client.num_live == 0
    assert scene.num_row_ends == 1
    scene.client.attach(scene.sent.append)
    assert len(scene.ids()) == 1, "it is not given to another engine"


async def test_who_comes_during_a_trial_waits_for_its_end() -> None:
    scene = Scene()
    scene.generate()
    [first] = scene.ids()
    scene.client.detach("signal 9", [first])
    scene.client.attach(scene.sent.append)
    scene.generate()
    assert scene.ids() == [first, first]
    scene.say(RequestOutput(first, [0]))
    assert len(scene.ids()) == 3


async def test_progress_that_another_engine_had_made_is_not_told_again() -> None:
    scene = Scene()
    sampling = SamplingParams(max_tokens=9, seed=1)
    request = GenerateRequest([1, 2, 3], sampling, wants_progress=True)
    mailbox = Mailbox()
    [stream] = scene.client.submit("r", [request], mailbox, 0.0)
    scene.say(RequestOutput(stream.req_id, [], num_computed_tokens=2))
    assert stream.read_progress() == 2
    scene.client.detach("signal 9")
    scene.client.attach(scene.sent.append)
    scene.say(RequestOutput(stream.req_id, [], num_computed_tokens=1))
    assert stream.read_progress() == 0
    scene.say(RequestOutput(stream.req_id, [], num_computed_tokens=3))
    assert stream.read_progress() == 3


async def test_preemptions_in_engines_that_are_gone_count() -> None:
    scene = Scene()
    generation = scene.generate()
    [req_id] = scene.ids()
    scene.say(RequestOutput(req_id, [0], num_preemptions=2))
    scene.client.stats = replace(STATS, num_preemptions_total=3)
    scene.client.detach("signal 9")
    scene.client.attach(scene.sent.append)
    scene.say(RequestOutput(req_id, [0], "length", num_preemptions=1))
    await generation.next()
    told = numbers(scene)
    assert told["request_num_preemptions_sum"] == 3
    assert told["num_preemptions_total"] == 3


def numbers(scene: Scene) -> dict[str, float]:
    """What /metrics tells, by name and by the value of the label that tells samples apart."""
    found = {}
    for family in scene.metrics.collect():
        for sample in family.samples:
            kinds = [value for label, value in sample.labels.items() if label != "model_name"]
            name = sample.name.removeprefix("mlx_lm_server:")
            found["/".join((name, *kinds))] = sample.value
    return found


async def test_preemptions_are_counted_however_a_sequence_ends() -> None:
    scene = Scene()
    generations = [scene.generate(), scene.generate(stop=("b",))]
    by_engine, by_stop_string = scene.ids()
    scene.say(RequestOutput(by_engine, [0]))
    scene.say(RequestOutput(by_engine, [0], "length", num_preemptions=2))
    scene.say(RequestOutput(by_stop_string, [0, 1], num_preemptions=1))
    for generation in generations:
        await generation.next()
        assert generation.is_done
    told = numbers(scene)
    assert (told["request_num_preemptions_count"], told["request_num_preemptions_sum"]) == (2, 3)
    assert told["request_num_preemptions_bucket/1"] == 1


async def test_prompt_tokens_are_told_by_where_they_came_from() -> None:
    scene = Scene()
    scene.generate()
    scene.generate()
    first, second = scene.ids()
    report = CacheReport(2, 0, 0, 0, [], [], "", 0.0)
    scene.say(RequestOutput(first, [0], cache=report))
    scene.say(RequestOutput(second, [0], cache=replace(report, num_cached_tokens=1)))
    told = numbers(scene)
    assert told["prompt_tokens_total"] == 4
    assert told["prompt_tokens_cached_total"] == 1
    assert told["prompt_tokens_by_source_total/local_compute"] == 3
    assert told["prompt_tokens_by_source_total/local_cache_hit"] == 1
    assert told["request_prefill_kv_computed_tokens_sum"] == 3
    assert told["request_prefill_kv_computed_tokens_count"] == 2


async def test_who_waits_is_told_by_what_for() -> None:
    scene = Scene()
    scene.generate(num_sequences=5)
    scene.metrics.num_live = lambda: scene.client.num_live
    stats = replace(STATS, num_running=2, num_waiting=3, num_deferred=1)
    scene.metrics.engine_stats = lambda: stats
    told = numbers(scene)
    assert told["num_requests_waiting"] == 3
    assert told["num_requests_waiting_by_reason/capacity"] == 2
    assert told["num_requests_waiting_by_reason/deferred"] == 1


EVENTS = st.sampled_from(
    ["token", "end", "error", "abort", "read", "leave", "die", "expire", "end of all"]
)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(EVENTS, st.integers(0, 5)), max_size=30), st.integers(1, 3))
def test_every_sequence_ends_exactly_once(
    events: list[tuple[str, int]], num_sequences: int
) -> None:
    asyncio.run(_play(events, num_sequences))


async def _play(events: list[tuple[str, int]], num_sequences: int) -> None:
    scene = Scene(first_token_timeout_s=1.0, token_timeout_s=1.0)
    generations = [scene.generate(num_sequences, stop=("c",)) for _ in range(2)]
    ends: Counter[tuple[int, int]] = Counter()
    failed: set[int] = set()
    rows: set[str] = set()
    num_seen = 0
    for event, choice in events:
        added = [m.req_id for m in scene.sent[num_seen:] if isinstance(m, AddRequest)]
        rows, num_seen = rows | set(added), len(scene.sent)
        row = sorted(rows)[choice % len(rows)] if rows else None
        match event:
            case "token" if row:
                scene.say(RequestOutput(row, [choice]))
            case "end" | "error" | "abort" if row:
                rows.discard(row)
                reason: Any = {"end": "length"}.get(event, event)
                scene.say(RequestOutput(row, [], reason))
            case "read":
                await _read(generations, choice % 2, ends, failed)
            case "leave":
                generations[choice % 2].cancel(ClientGoneError("left"))
            case "die":
                rows.clear()
                num_seen = len(scene.sent)
                scene.client.detach("signal 9")
                scene.client.attach(scene.sent.append)
            case "end of all" if choice == 0:
                rows.clear()
                scene.client.give_up(EngineDiedError("dead"))
            case "expire":
                scene.client.expire(1e12)
        for req_id in scene.aborted():  # the engine answers, late or not
            if choice % 2 and req_id in rows:
                rows.discard(req_id)
                scene.say(RequestOutput(req_id, [], "abort"))
    for at, generation in enumerate(generations):
        generation.cancel(ClientGoneError("the end"))
        while not generation.is_done:
            await _read(generations, at, ends, failed)
    assert all(count == 1 for count in ends.values())
    for at in (0, 1):
        num_ended = sum(1 for owner, _ in ends if owner == at)
        assert num_ended == num_sequences or at in failed
    assert sorted(map(id, scene.done)) == sorted(map(id, generations))
    assert scene.metrics.finished.total() == 2 * num_sequences
    assert len(scene.aborted()) == len(set(scene.aborted()))


async def _read(
    generations: list[Generation], at: int, ends: Counter[tuple[int, int]], failed: set[int]
) -> None:
    """One read that never waits for what will not come."""
    generation = generations[at]
    if generation.is_done:
        return
    reading = asyncio.create_task(generation.next())
    for _ in range(3):
        await asyncio.sleep(0)
    if not reading.done():
        reading.cancel()
        return
    try:
        deltas = reading.result()
    except ServerError:
        failed.add(at)
        return
    for delta in deltas:
        assert (at, delta.index) not in ends
        if delta.finish_reason is not None:
            ends[at, delta.index] += 1
