"""However many requests are in an engine, only the one that it dies of is found guilty."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_lm_server.protocol import RequestOutput, SamplingParams
from mlx_lm_server.server.answers.generate_request import GenerateRequest
from mlx_lm_server.server.engines.output_stream import Mailbox, OutputStream
from mlx_lm_server.server.engines.trials import Trials


def streams(num: int) -> list[OutputStream]:
    request = GenerateRequest([1], SamplingParams(max_tokens=9, seed=0))
    return [OutputStream(f"r{n}", n, request, Mailbox(), 0.0) for n in range(num)]


def say(*these: OutputStream) -> None:
    for stream in these:
        stream.feed(RequestOutput(stream.req_id, [7]), 0.0)


def enter(*these: OutputStream) -> None:
    for stream in these:
        stream.enter_engine(0.0)


async def test_who_had_moved_goes_on_first_and_the_suspects_follow_in_halves() -> None:
    a, b, c, d, e = these = streams(5)
    trials = Trials()
    enter(*these)
    say(a, b)
    assert trials.open(these) is None
    for group in ([a, b], [c, d], [e]):
        assert list(trials.next_group()) == group
        enter(*group)
        assert not trials.next_group(), "they have not moved yet"
        assert not trials.are_over
        say(*group)
    assert not trials.next_group()
    assert trials.are_over


async def test_a_suspect_that_is_left_alone_is_tried_alone_and_then_guilty() -> None:
    a, b = streams(2)
    trials = Trials()
    enter(a, b)
    say(a)
    assert trials.open([a, b]) is None
    enter(*trials.next_group())
    say(a)
    enter(*trials.next_group())
    assert trials.open([a, b]) is None, "the other one was there too"
    assert list(trials.next_group()) == [b]
    enter(b)
    assert trials.open([b]) is b
    assert trials.are_over


async def test_a_suspect_that_moves_is_none_any_more() -> None:
    [a] = streams(1)
    trials = Trials()
    for _ in range(5):
        enter(a)
        assert trials.open([a]) is None
        enter(*trials.next_group())
        say(a)


async def test_who_has_left_is_not_waited_for() -> None:
    a, b, c = streams(3)
    trials = Trials()
    enter(a, b, c)
    trials.open([a, b, c])
    assert list(trials.next_group()) == [a, b]
    enter(a, b)
    say(a)
    b.is_ended = c.is_ended = True
    assert not trials.next_group()
    assert trials.are_over


@settings(max_examples=300, deadline=None)
@given(st.integers(1, 40), st.integers(0, 39), st.integers(0, 5), st.booleans())
def test_the_killer_is_found_within_few_deaths(
    num: int, killer: int, kills_after: int, knows_steps: bool
) -> None:
    asyncio.run(_find(num, killer % num, kills_after, knows_steps=knows_steps))


async def _find(num: int, killer: int, kills_after: int, *, knows_steps: bool) -> None:
    """Plays an engine of eight rows that gives each row a token a step, and dies in the step in
    which the killer has had so many tokens."""
    these = streams(num)
    trials, culprit, num_deaths = Trials(), these[killer], 0
    live = list(these)
    while True:
        engine: list[OutputStream] = []
        while True:
            group = list(trials.next_group())
            if trials.are_over:
                group = [stream for stream in live if stream not in engine]
            enter(*group)
            engine += group
            step = engine[:8]
            if culprit in step and len(culprit.output_ids) >= kills_after:
                break
            say(*step)
            for stream in [stream for stream in step if len(stream.output_ids) > 6]:
                stream.is_ended = True
                engine.remove(stream)
                live.remove(stream)
        num_deaths += 1
        guilty = trials.open(step if knows_steps else engine)
        if guilty is not None:
            break
        assert num_deaths < 12
    if guilty is not culprit:
        pytest.fail(f"{guilty.req_id} was found guilty of what {culprit.req_id} did")
