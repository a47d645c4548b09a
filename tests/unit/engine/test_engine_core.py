"""The order of a step, and what of the time each step is told."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from mlx_lm_server.core.plan import DecodeRow, StepPlan
from mlx_lm_server.engine.engine_core import EngineCore

BUILD_S, FORWARD_S = 1.0, 10.0


def plan_of(step: int) -> StepPlan:
    return StepPlan(step, (), (), (), (DecodeRow(0, 0, 0, 5),), ())


class Clock:
    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


class Scheduler:
    """Two steps, and what they were told to have taken."""

    def __init__(self, are_awaited: bool) -> None:
        self.left = [plan_of(1), plan_of(2)]
        self.seconds: list[float] = []
        self._are_awaited = are_awaited

    def schedule(self, _now_s: float) -> StepPlan | None:
        return self.left.pop(0) if self.left else None

    def are_awaited(self, _plan: StepPlan, _tokens: list[int]) -> bool:
        return self._are_awaited

    def update(
        self,
        _plan: StepPlan,
        _tokens: Any,
        step_s: float,
        _now_s: float,
        _logprobs: Mapping[Any, Any],
    ) -> list[Any]:
        self.seconds.append(step_s)
        return []


class SlowRunner:
    """Submits as MLX does on a CPU: while the forward runs."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._built = self._submitted = False
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
        return [7]

    def goes_on_at_once(self, are_awaited: bool) -> bool:
        return not are_awaited

    def read_logprobs(self) -> Mapping[int, Any]:
        return {}


@pytest.mark.parametrize("are_awaited", [False, True])
def test_a_step_is_told_its_own_time(are_awaited: bool) -> None:
    clock, scheduler = Clock(), Scheduler(are_awaited)
    core = EngineCore(scheduler, SlowRunner(clock), clock)  # type: ignore[arg-type]
    for _ in range(3):
        core.step()
    assert scheduler.seconds[0] == BUILD_S + FORWARD_S + BUILD_S  # both graphs are built meanwhile
    assert scheduler.seconds[1] == FORWARD_S


@pytest.mark.parametrize("are_awaited", [False, True])
def test_awaited_tokens_are_told_before_the_next_forward_is_submitted(are_awaited: bool) -> None:
    clock = Clock()
    runner = SlowRunner(clock)
    core = EngineCore(Scheduler(are_awaited), runner, clock)  # type: ignore[arg-type]
    core.step()
    core.step()
    assert runner.calls == ["read", "submit", "read"] + ["submit"] * (not are_awaited)
