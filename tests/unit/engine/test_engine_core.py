"""The order of a step, and what of the time each step is told."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from mlx_lm_server.core.plan import DecodeRow, PrefillChunk, StepPlan
from mlx_lm_server.engine.engine_core import EngineCore
from mlx_lm_server.protocol import Abort, RequestOutput

BUILD_S, FORWARD_S = 1.0, 10.0


def plan_of(step: int) -> StepPlan:
    return StepPlan(step, (), (), (), (DecodeRow(0, 0, 0, 5),), ())


class Clock:
    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


class Scheduler:
    """Two steps of requests `a` and `b`, and what they were told to have taken."""

    def __init__(self, awaited: set[str]) -> None:
        self.left = [plan_of(1), plan_of(2)]
        self.seconds: list[float] = []
        self._awaited = awaited

    def schedule(self, _now_s: float) -> StepPlan | None:
        return self.left.pop(0) if self.left else None

    def awaited(self, _plan: StepPlan, _tokens: list[int]) -> set[str]:
        return self._awaited

    def abort(self, req_id: str) -> RequestOutput:
        return RequestOutput(req_id, [], finish_reason="abort")

    def update(
        self,
        _plan: StepPlan,
        _tokens: Any,
        step_s: float,
        _now_s: float,
        _logprobs: Mapping[Any, Any],
    ) -> list[RequestOutput]:
        self.seconds.append(step_s)
        return [RequestOutput("a", [7]), RequestOutput("b", [8])]


class Runner:
    def __init__(self, clock: Clock, *, submits_slowly: bool = True) -> None:
        self._clock = clock
        self._built = self._submitted = False
        self.submits_slowly = submits_slowly
        self.calls: list[str] = []

    def execute(self, _plan: StepPlan) -> None:
        self._clock.now_s += BUILD_S
        self._built = True

    def submit(self) -> None:
        if self._built:
            self.calls.append("submit")
            self._clock.now_s += FORWARD_S
            self._built = False

    def sample(self) -> None: ...

    def read(self) -> list[int]:
        self.calls.append("read")
        return [7, 8]

    def read_logprobs(self) -> Mapping[int, Any]:
        return {}


def engine(awaited: set[str], **how: bool) -> tuple[EngineCore, Scheduler, Runner]:
    clock = Clock()
    scheduler, runner = Scheduler(awaited), Runner(clock, **how)
    return EngineCore(scheduler, runner, clock), scheduler, runner  # type: ignore[arg-type]


def told(outputs: list[RequestOutput]) -> list[str]:
    return [output.req_id for output in outputs]


@pytest.mark.parametrize("awaited", [set(), {"a"}])
def test_a_step_is_told_its_own_time(awaited: set[str]) -> None:
    core, scheduler, _ = engine(awaited)
    while len(scheduler.seconds) < 2:
        core.step()
    assert scheduler.seconds[0] == BUILD_S + FORWARD_S + BUILD_S  # both graphs are built meanwhile
    assert scheduler.seconds[1] == FORWARD_S


def test_tokens_are_told_once_the_next_forward_is_submitted() -> None:
    core, _, runner = engine(set())
    core.step()
    assert told(core.step()) == ["a", "b"]
    assert runner.calls == ["read", "submit", "read", "submit"]


def test_awaited_tokens_are_told_before_that_and_only_they() -> None:
    core, _, runner = engine({"a"})
    core.step()
    assert told(core.step()) == ["a"]
    assert runner.calls == ["read", "submit", "read"]
    assert told(core.step()) == ["b"]
    assert runner.calls == ["read", "submit", "read", "submit"]
    assert told(core.step()) == ["a", "b"], "the last ones, with nothing to submit"


def test_the_tokens_of_each_step_that_computed_some_are_told_once() -> None:
    core, scheduler, _ = engine(set())
    chunk = PrefillChunk(1, 0, 1, 0, (5, 6, 7), samples=True)
    mixed = StepPlan(3, (), (), (), (DecodeRow(0, 0, 0, 5),), (chunk,))
    scheduler.left += [mixed, StepPlan(4, (0,), (), (), (), ())]
    assert core.take_step_tokens() == []
    core.step()
    core.step()
    core.step()
    assert core.take_step_tokens() == [1, 1]
    core.step()
    core.step()
    assert core.take_step_tokens() == [4], "the last only gives rows back"
    assert core.take_step_tokens() == []


def test_nothing_is_told_of_a_request_that_was_aborted_meanwhile() -> None:
    core, _, runner = engine({"a"})
    core.step()
    core.step()
    assert told(core.handle([Abort("b")])) == ["b"]
    core.step()
    assert runner.calls[2:] == ["read", "submit", "read"], "the step that comes next, and not held"


def test_where_submitting_is_quick_nothing_is_told_by_itself() -> None:
    core, _, runner = engine({"a"}, submits_slowly=False)
    core.step()
    assert told(core.step()) == ["a", "b"]
    assert runner.calls == ["read", "submit", "read", "submit"]
