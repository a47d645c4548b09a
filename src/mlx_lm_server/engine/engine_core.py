"""The step loop: decide, compute, tell."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import msgspec

from mlx_lm_server.core.kv_geometry import KVGeometry
from mlx_lm_server.core.plan import StepPlan, StepResult
from mlx_lm_server.core.request import Request
from mlx_lm_server.core.scheduler import Scheduler
from mlx_lm_server.engine.disk_cache import CLOSE_LIMIT_S, FLUSH_LIMIT_S, DiskCache
from mlx_lm_server.engine.prefill_progress import PrefillProgress
from mlx_lm_server.engine.told_steps import ToldSteps
from mlx_lm_server.errors import RequestError
from mlx_lm_server.protocol import Abort, AddRequest, EngineStats, RequestOutput

if TYPE_CHECKING:
    from mlx_lm_server.runner.backend import Upkeep

log = logging.getLogger(__name__)


class Handle(Protocol):
    """A plan on its way."""

    def collect(self) -> Iterator[StepResult]:
        """Waits for the plan. Gives what its rows yielded, each row once, in parts that are to be
        told one by one; the first, which may be empty, as soon as the plan has ended."""


class Runner(Protocol):
    """What executes plans; `runner.ModelRunner` is the real one."""

    def submit(self, plan: StepPlan) -> Handle:
        """Takes a plan, at most one ahead of the last that was collected."""


@dataclass(frozen=True, slots=True)
class _Running:
    plan: StepPlan
    handle: Handle
    since_s: float  # when the plan before was read, if there was one


class EngineCore:
    """Scheduler and runner, one step ahead of each other. Lives on the engine's main thread.

    A step plans and builds the next forward while one runs, and only then waits for the tokens of
    that: the device waits for the host no longer than it takes to submit what is built.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        runner: Runner,
        clock: Callable[[], float],
        peak_memory: Callable[[], int] = lambda: 0,
        disk: DiskCache | None = None,
        upkeep: Upkeep | None = None,
    ) -> None:
        self._scheduler = scheduler
        self._runner = runner
        self._clock = clock
        self._peak_memory = peak_memory
        self._disk = disk
        self._upkeep = upkeep
        self._cache_share = 1.0
        self._running: _Running | None = None
        self._read_s = 0.0  # when the last forward had ended
        self._progress = PrefillProgress(clock)
        self.told_steps = ToldSteps()
        self._step_tokens: list[int] = []

    @property
    def geometry(self) -> KVGeometry:
        """What rows and checkpoints take."""
        return self._scheduler.geometry

    @property
    def has_work(self) -> bool:
        return self._running is not None or self._scheduler.has_work

    @property
    def waits_for_tier(self) -> bool:
        """A step would only look whether the disk has answered."""
        return self._running is None and self._scheduler.waits_for_tier

    def stats(self) -> EngineStats:
        stats = self._scheduler.stats(self._peak_memory())
        if self._upkeep is not None:
            stats = msgspec.structs.replace(stats, memory_pressure=self._upkeep.pressure)
        if self._disk is None:
            return stats
        tier = self._disk.stats(self._scheduler.num_restored_tokens)
        return msgspec.structs.replace(stats, tier=tier)

    def take_step_tokens(self) -> list[int]:
        """How many tokens each step computed that was read since the last call."""
        taken, self._step_tokens = self._step_tokens, []
        return taken

    def close(self, flush_limit_s: float = FLUSH_LIMIT_S) -> None:
        """Give what only memory has to the disk tier, for at most so long, and close it."""
        disk = self._disk
        if disk is None:
            return
        ends_s = self._clock() + flush_limit_s
        disk.keep_late()
        self._scheduler.abort_all()
        self._scheduler.offload_all()
        while (self.has_work or self._scheduler.has_offloads) and self._clock() < ends_s:
            if not self.has_work:
                disk.wait_for_room(ends_s - self._clock())
            self.step()
        if self._scheduler.has_offloads:
            log.warning("not all of the cache was written to disk within %g s", flush_limit_s)
        disk.close(max(CLOSE_LIMIT_S, ends_s - self._clock()))

    def handle(self, messages: Iterable[AddRequest | Abort]) -> list[RequestOutput]:
        """Take in what clients want; the outputs are the ends of what ended by it."""
        outputs: list[RequestOutput] = []
        for message in messages:
            match message:
                case AddRequest():
                    outputs += self._add(message)
                case Abort():
                    ended = self._scheduler.abort(message.req_id)
                    outputs += [ended] if ended else []
        self._progress.forget(outputs)
        return outputs

    def _add(self, message: AddRequest) -> Sequence[RequestOutput]:
        try:
            self._scheduler.add(Request.from_message(message, self._clock()))
        except RequestError as error:
            if message.output_ids:  # this engine has less memory than the one before
                return [RequestOutput(message.req_id, [], finish_reason="length")]
            return [RequestOutput(message.req_id, [], finish_reason="error", error=error.message)]
        if message.wants_progress and not message.output_ids:
            self._progress.watch(message.req_id)
        return ()

    def step(self) -> list[RequestOutput]:
        """Goes one forward further. Returns the outputs of the forward before."""
        return [output for part in self.step_in_parts() for output in part]

    def step_in_parts(self) -> Iterator[list[RequestOutput]]:
        """Goes one forward further, as its outputs are told: part by part, each before what comes
        next is submitted."""
        since_s = self._clock()
        if self._scheduler.plans_after_reading and self._running is not None:
            yield from self._read()
            since_s = self._read_s
        plan = self._scheduler.schedule(self._clock())
        if plan is None:
            yield from self._read()
            self.told_steps.none_left()
            return
        self.told_steps.before(plan)
        handle = self._runner.submit(plan)
        if self._running is not None:
            yield from self._read()
            since_s = self._read_s
        self._running = _Running(plan, handle, since_s)
        if self._upkeep is not None:
            self._upkeep.after_step(took_memory=plan.takes_memory)
            self._hold_cache(self._upkeep.cache_share)

    def rest(self) -> None:
        """Uses the time in which there is nothing to do."""
        if self._upkeep is not None:
            self._upkeep.rest()
            self._hold_cache(self._upkeep.cache_share)

    def _hold_cache(self, share: float) -> None:
        if share != self._cache_share:
            self._cache_share = share
            self._scheduler.hold_cache(share)

    def _read(self) -> Iterator[list[RequestOutput]]:
        """Wait for the forward under way, and take in what it gave."""
        running, self._running = self._running, None
        if running is None:
            return
        plan, read_s = running.plan, None
        progress = self._progress.after(plan)
        if plan.num_tokens:
            self._step_tokens.append(plan.num_tokens)
        for result in running.handle.collect():
            now_s = self._clock()
            read_s = now_s if read_s is None else read_s
            if result:
                outputs = progress + self._scheduler.update(plan, result, now_s)
                progress = []
                self._progress.forget(outputs)
                yield outputs
        if progress:
            yield progress
        self._read_s = self._clock() if read_s is None else read_s
        self._scheduler.end_step(plan, self._read_s - running.since_s)
