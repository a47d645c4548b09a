"""Times steps that are submitted late and early, over a small slab and a large one.

How large the large one is, memory bounds and time: attention over much takes some devices seconds a
step. So it is found by making slabs larger, for as long as a step over the next one is expected to
leave time for all steps that are timed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Protocol

import mlx.core as mx

from mlx_lm_server.core.plan import CreateSlab, JoinedRow, RowWork, StepPlan, StepResult
from mlx_lm_server.core.submitting import ALWAYS, NEVER, EarlySteps, Submitting, Trial
from mlx_lm_server.protocol import SamplingParams
from mlx_lm_server.runner.loading.tiny_plans import (
    LARGE_SLAB,
    SMALL_SLAB,
    plan_of,
    scratch,
    token_of,
)
from mlx_lm_server.runner.state.kv_storage import KVStorage

NUM_ROWS = 8
PROMPT_TOKENS = 4
ROUNDS, WARM_STEPS, TIMED_STEPS = 3, 2, 5
# Half of it is longer than all steps that are run over it.
SMALL_CAPACITY = 256
# Large enough that a copy takes longer than two steps differ by, on any device.
MOST_SLAB_BYTES = 256 << 20
MOST_CAPACITY = 1 << 17
# How much larger the next slab is that is looked at.
GROWTH = 4


class Handle(Protocol):
    def collect(self) -> Iterator[StepResult]: ...


class Steps(Protocol):
    """What executes plans; `ModelRunner` is the real one."""

    early: EarlySteps

    def submit(self, plan: StepPlan) -> Handle: ...


@dataclass(frozen=True, slots=True)
class _Seen:
    step_s: float
    peak_bytes: int


class BothWays:
    """Used once, while the model is loaded."""

    def __init__(
        self,
        steps: Steps,
        storage: KVStorage,
        max_rows: int,
        room_bytes: int,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """`room_bytes` is what the slabs may take at most, with what is made in copying."""
        self._steps = steps
        self._clock = clock
        self._storage = storage
        self._num_rows = min(NUM_ROWS, max_rows)
        self._position = 0
        bound = min(MOST_SLAB_BYTES, room_bytes // 3) // self._num_rows
        self._most_capacity = (
            storage.geometry.tokens_in(bound, MOST_CAPACITY) if storage.layers else MOST_CAPACITY
        )

    @staticmethod
    def least_s(step_s: float) -> float:
        """Returns what measuring takes at least where a step takes `step_s`."""
        return 4 * (WARM_STEPS + TIMED_STEPS + 1) * step_s

    def measured(self, has_time: Callable[[], bool], limit_s: float) -> Submitting | None:
        """Returns the fastest of some rounds each, of one where `has_time` says that it is up; None
        where there is no room to try, or a step over any large slab would take so long that all of
        them took over `limit_s`."""
        if self._most_capacity <= SMALL_CAPACITY:
            return None
        with _kept(self._steps):
            capacity = self._affordable_capacity(limit_s)
            if capacity is None:
                return None
            capacities = {SMALL_SLAB: SMALL_CAPACITY, LARGE_SLAB: capacity}
            with self._slabs(capacities):
                trials = {slab: self._trial(slab, c) for slab, c in capacities.items()}
                for _ in range(ROUNDS - 1):
                    if not has_time():
                        break
                    trials = {
                        slab: _with(old, self._trial(slab, capacities[slab]))
                        for slab, old in trials.items()
                    }
                self._leave()
        return Submitting(trials[SMALL_SLAB], trials[LARGE_SLAB])

    def _slabs(self, capacities: Mapping[int, int]) -> AbstractContextManager[None]:
        slabs = [CreateSlab(slab, self._num_rows, c) for slab, c in capacities.items()]
        return scratch(self._storage, *slabs)

    def _affordable_capacity(self, limit_s: float) -> int | None:
        """Returns the largest capacity with which there is time for all steps; None where there is
        for no more than the small one's. What a step takes beyond one over the small slab grows
        with the capacity."""
        small_s = self._step_s(SMALL_CAPACITY)
        best, beyond_s = SMALL_CAPACITY, 0.0
        while best < self._most_capacity:
            capacity = min(GROWTH * best, self._most_capacity)
            if self.least_s(small_s + beyond_s * capacity / best) > limit_s:
                break
            step_s = self._step_s(capacity)
            if self.least_s(step_s) > limit_s:
                break
            best, beyond_s = capacity, max(0.0, step_s - small_s)
        return best if best > SMALL_CAPACITY else None

    def _step_s(self, capacity: int) -> float:
        """Returns the seconds of one late step, after another of its form."""
        with self._slabs({LARGE_SLAB: capacity}):
            self._join(LARGE_SLAB, capacity)
            self._steps.early = NEVER
            _collect(self._steps.submit(self._decodes(LARGE_SLAB)))
            begun_s = self._clock()
            _collect(self._steps.submit(self._decodes(LARGE_SLAB)))
            step_s = self._clock() - begun_s
            self._leave()
        return step_s

    def _trial(self, slab: int, capacity: int) -> Trial:
        self._join(slab, capacity)
        late, early = (self._run(slab, which) for which in (NEVER, ALWAYS))
        slab_bytes = self._storage.slab_bytes([slab])
        return Trial(slab_bytes, late.step_s, early.step_s, late.peak_bytes, early.peak_bytes)

    def _join(self, slab: int, capacity: int) -> None:
        self._leave()
        self._position = capacity // 2  # nobody reads what attention makes of it
        rows = range(self._num_rows)
        prompts = [tuple(token_of(row, at) for at in range(PROMPT_TOKENS)) for row in rows]
        sampling = SamplingParams(max_tokens=1, seed=0, temperature=0.0)
        plan = StepPlan(
            0,
            joined_rows=tuple(
                JoinedRow("", row, prompt, (), sampling)
                for row, prompt in zip(rows, prompts, strict=True)
            ),
            chunks=tuple(
                RowWork(row, slab, row, 0, prompt)
                for row, prompt in zip(rows, prompts, strict=True)
            ),
        )
        _collect(self._steps.submit(plan))

    def _leave(self) -> None:
        _collect(self._steps.submit(StepPlan(0, left_rows=tuple(range(self._num_rows)))))

    def _run(self, slab: int, early: EarlySteps) -> _Seen:
        """Runs steps one ahead of the other, as the engine does."""
        self._steps.early = early
        begun_s, held_bytes = 0.0, mx.get_active_memory()
        running = self._steps.submit(self._decodes(slab))
        for number in range(WARM_STEPS + TIMED_STEPS):
            if number == WARM_STEPS:
                begun_s = self._clock()
                mx.reset_peak_memory()
            following = self._steps.submit(self._decodes(slab))
            _collect(running)
            running = following
        step_s = (self._clock() - begun_s) / TIMED_STEPS
        _collect(running)
        return _Seen(step_s, mx.get_peak_memory() - held_bytes)

    def _decodes(self, slab: int) -> StepPlan:
        at, self._position = self._position, self._position + 1
        return plan_of([RowWork(row, slab, row, at) for row in range(self._num_rows)])


def _with(old: Trial, new: Trial) -> Trial:
    """Returns the least time, which others disturbed least, and the highest peak: what is copied
    now and then needs its memory as well."""
    return Trial(
        old.slab_bytes,
        min(old.late_s, new.late_s),
        min(old.early_s, new.early_s),
        max(old.late_peak_bytes, new.late_peak_bytes),
        max(old.early_peak_bytes, new.early_peak_bytes),
    )


def _collect(handle: Handle) -> Sequence[StepResult]:
    return list(handle.collect())


@contextmanager
def _kept(steps: Steps) -> Iterator[None]:
    """Which steps are submitted early is afterwards as it was."""
    early = steps.early
    try:
        yield
    finally:
        steps.early = early
