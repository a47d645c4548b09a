"""The order of a step, and what of the time each step is told."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from mlx_lm_server.core.plan import JoinedRow, RowResult, RowWork, StepPlan, StepResult
from mlx_lm_server.core.request import Request
from mlx_lm_server.engine.engine_core import EngineCore
from mlx_lm_server.engine.told_steps import ToldSteps
from mlx_lm_server.errors import RequestTooLargeError
from mlx_lm_server.protocol import AddRequest, RequestOutput, SamplingParams

BUILD_S, FORWARD_S = 1.0, 10.0
NAMES = ("a", "b")


def plan_of(step: int) -> StepPlan:
    return StepPlan(step, decodes=(RowWork(0, 0, 0, 5), RowWork(1, 0, 1, 9)))


class Clock:
    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


class Scheduler:
    """Steps of requests `a` and `b`, in rows 0 and 1, and what they were told to have taken."""

    def __init__(self, *, plans_after_reading: bool = False) -> None:
        self.left = [plan_of(1), plan_of(2)]
        self.seconds: list[float] = []
        self.plans_after_reading = plans_after_reading
        self.calls: list[str] = []
        self.held: list[float] = []

    def hold_cache(self, share: float) -> None:
        self.held.append(share)

    def schedule(self, _now_s: float) -> StepPlan | None:
        plan = self.left.pop(0) if self.left else None
        self.calls.append(f"plan {plan.step if plan else None}")
        return plan

    def update(self, plan: StepPlan, result: StepResult, _now_s: float) -> list[RequestOutput]:
        if result:
            self.calls.append(f"update {plan.step}")
        return [RequestOutput(NAMES[row], list(given.token_ids)) for row, given in result.items()]

    def end_step(self, _plan: StepPlan, step_s: float) -> None:
        self.seconds.append(step_s)


class Runner:
    """Submits a plan at once where none is under way, else when that is collected. Tokens of the
    rows that are awaited come in a part of their own, before that."""

    def __init__(self, clock: Clock, awaited: tuple[int, ...] = ()) -> None:
        self._clock = clock
        self._awaited = awaited
        self._under_way: StepPlan | None = None
        self._built: StepPlan | None = None
        self.calls: list[str] = []

    def submit(self, plan: StepPlan) -> Handle:
        self._clock.now_s += BUILD_S
        self._built = plan
        if self._under_way is None:
            self._start()
        return Handle(self, plan)

    def _start(self) -> None:
        if self._built is not None:
            self.calls.append("submit")
            self._clock.now_s += FORWARD_S
        self._under_way, self._built = self._built, None

    def collect(self, plan: StepPlan) -> Iterator[StepResult]:
        assert plan is self._under_way
        self.calls.append("read")
        given = {work.row: RowResult((7 + work.row,)) for work in plan.sampling}
        first = {row: given.pop(row) for row in self._awaited if self._built}
        yield first
        self._start()
        yield given


class WaitingRunner(Runner):
    """Its forwards take their time after they were submitted, as those of a GPU do."""

    _ends_s = 0.0

    def _start(self) -> None:
        super()._start()
        if self._under_way is not None:
            self._clock.now_s -= FORWARD_S
            self._ends_s = self._clock.now_s + FORWARD_S

    def collect(self, plan: StepPlan) -> Iterator[StepResult]:
        self._clock.now_s = max(self._clock.now_s, self._ends_s)
        yield from super().collect(plan)


class Handle:
    def __init__(self, runner: Runner, plan: StepPlan) -> None:
        self._runner, self._plan = runner, plan

    def collect(self) -> Iterator[StepResult]:
        return self._runner.collect(self._plan)


def engine(awaited: tuple[int, ...] = (), **how: bool) -> tuple[EngineCore, Scheduler, Runner]:
    clock = Clock()
    scheduler, runner = Scheduler(**how), Runner(clock, awaited)
    return EngineCore(scheduler, runner, clock), scheduler, runner  # type: ignore[arg-type]


def told(outputs: list[RequestOutput]) -> list[str]:
    return [output.req_id for output in outputs]


@pytest.mark.parametrize("awaited", [(), (0,)])
def test_a_step_is_told_its_own_time(awaited: tuple[int, ...]) -> None:
    core, scheduler, _ = engine(awaited)
    while len(scheduler.seconds) < 2:
        core.step()
    assert scheduler.seconds[0] == BUILD_S + FORWARD_S + BUILD_S  # both graphs are built meanwhile
    assert scheduler.seconds[1] == FORWARD_S


def test_a_step_is_planned_and_built_while_the_one_before_runs() -> None:
    core, scheduler, runner = engine()
    core.step()
    assert told(core.step()) == ["a", "b"]
    assert scheduler.calls == ["plan 1", "plan 2", "update 1"]
    assert runner.calls == ["submit", "read", "submit"]


def test_where_what_comes_next_depends_on_a_step_it_is_read_before_the_next_is_planned() -> None:
    core, scheduler, runner = engine(plans_after_reading=True)
    core.step()
    assert told(core.step()) == ["a", "b"]
    assert scheduler.calls == ["plan 1", "update 1", "plan 2"]
    assert runner.calls == ["submit", "read", "submit"]


@pytest.mark.parametrize("plans_after_reading", [True, False])
def test_waiting_for_a_step_is_no_time_of_the_next(plans_after_reading: bool) -> None:
    clock, scheduler = Clock(), Scheduler(plans_after_reading=plans_after_reading)
    core = EngineCore(scheduler, WaitingRunner(clock), clock)  # type: ignore[arg-type]
    while len(scheduler.seconds) < 2:
        core.step()
    first, second = scheduler.seconds
    assert first == BUILD_S + FORWARD_S
    assert second == (BUILD_S + FORWARD_S if plans_after_reading else FORWARD_S)


def test_awaited_tokens_are_told_before_the_next_forward_is_submitted() -> None:
    core, _, runner = engine((0,))
    core.step()
    parts = core.step_in_parts()
    assert told(next(parts)) == ["a"]
    assert runner.calls == ["submit", "read"]
    assert told(next(parts)) == ["b"]
    assert runner.calls == ["submit", "read", "submit"]
    assert list(parts) == []
    assert told(core.step()) == ["a", "b"], "the last ones, with nothing to submit"


def test_the_tokens_of_each_step_that_computed_some_are_told_once() -> None:
    core, scheduler, _ = engine()
    chunk = RowWork(1, 0, 1, 0, (5, 6, 7))
    joined = JoinedRow("b", 1, (5, 6, 7), (), SamplingParams(max_tokens=1, seed=0))
    mixed = StepPlan(3, (), (joined,), (), (RowWork(0, 0, 0, 5),), (chunk,))
    scheduler.left += [mixed, StepPlan(4, left_rows=(0,))]
    assert core.take_step_tokens() == []
    core.step()
    core.step()
    core.step()
    assert core.take_step_tokens() == [2, 2]
    core.step()
    core.step()
    assert core.take_step_tokens() == [4], "the last only gives rows back"
    assert core.take_step_tokens() == []


def test_whose_step_it_is_is_told_before_it_is_submitted() -> None:
    core, scheduler, runner = engine()
    note = Note(runner)
    core.told_steps = ToldSteps(note)  # type: ignore[arg-type]
    sampling = SamplingParams(max_tokens=9, seed=0)
    rows = tuple(JoinedRow(name, row, (5,), (), sampling) for row, name in enumerate(NAMES))
    scheduler.left[0] = StepPlan(1, joined_rows=rows, decodes=scheduler.left[0].decodes)
    scheduler.left[1] = StepPlan(2, decodes=scheduler.left[1].decodes[1:])
    for _ in range(3):
        core.step()
    assert note.told == [(0, ["a", "b"]), (1, ["b"]), (2, [])]


class Note:
    """Keeps what it is told, each time with how many plans had been submitted."""

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        self.told: list[tuple[int, list[str]]] = []

    def tell(self, req_ids: list[str]) -> None:
        self.told.append((self._runner.calls.count("submit"), req_ids))

    def clear(self) -> None:
        self.tell([])


class SmallScheduler(Scheduler):
    """Has no room for anything."""

    def add(self, _request: Request) -> None:
        raise RequestTooLargeError("it does not fit")


def test_an_answer_that_no_longer_fits_ends_with_what_was_told() -> None:
    clock = Clock()
    core = EngineCore(SmallScheduler(), Runner(clock), clock)  # type: ignore[arg-type]
    sampling = SamplingParams(max_tokens=9, seed=0)
    new, told = AddRequest("new", [1], sampling), AddRequest("told", [1], sampling, output_ids=[2])
    ends = [(output.req_id, output.finish_reason) for output in core.handle([new, told])]
    assert ends == [("new", "error"), ("told", "length")]


class Upkeep:
    """Memory that is as short as it is told to be."""

    pressure = "normal"
    cache_share = 1.0

    def after_step(self, *, took_memory: bool) -> None:
        pass

    def rest(self) -> None:
        pass


@pytest.mark.parametrize("rests", [True, False])
def test_the_cache_is_held_to_its_share_once_after_each_change(rests: bool) -> None:
    clock, scheduler, upkeep = Clock(), Scheduler(), Upkeep()
    scheduler.left = [plan_of(number) for number in range(1, 9)]
    core = EngineCore(
        scheduler,  # type: ignore[arg-type]
        Runner(clock),
        clock,
        upkeep=upkeep,  # type: ignore[arg-type]
    )
    for upkeep.cache_share in (1.0, 0.75, 0.75, 0.0, 0.0, 1.0, 1.0):
        if rests:
            core.rest()
        else:
            core.step()
    assert scheduler.held == [0.75, 0.0, 1.0]
