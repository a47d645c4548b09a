"""The step loop: decide, compute, tell."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Protocol

import msgspec

from mlx_lm_server.core.kv_geometry import KVGeometry
from mlx_lm_server.core.plan import RowLogprobs, StepPlan
from mlx_lm_server.core.request import Request
from mlx_lm_server.core.scheduler import Scheduler
from mlx_lm_server.engine.disk_cache import CLOSE_LIMIT_S, FLUSH_LIMIT_S, DiskCache
from mlx_lm_server.engine.prefill_progress import PrefillProgress
from mlx_lm_server.errors import RequestError
from mlx_lm_server.protocol import Abort, AddRequest, EngineStats, RequestOutput

log = logging.getLogger(__name__)


class Runner(Protocol):
    """What executes plans; `runner.ModelRunner` is the real one."""

    def execute(self, plan: StepPlan) -> None: ...

    def submit(self) -> None: ...

    @property
    def submits_slowly(self) -> bool:
        """Whether the next submission takes so long that who waits for a token would notice."""

    def sample(self) -> None: ...

    def read(self) -> list[int]: ...

    def read_logprobs(self) -> Mapping[int, RowLogprobs]: ...


class EngineCore:
    """Scheduler and runner, one step ahead of each other. Lives on the engine's main thread.

    A step submits the draw for the forward that runs, plans and builds the next forward, and only
    then waits for the drawn tokens: the device waits for the host no longer than it takes to
    submit what is built.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        runner: Runner,
        clock: Callable[[], float],
        peak_memory: Callable[[], int] = lambda: 0,
        disk: DiskCache | None = None,
    ) -> None:
        self._scheduler = scheduler
        self._runner = runner
        self._clock = clock
        self._peak_memory = peak_memory
        self._disk = disk
        self._running: StepPlan | None = None
        self._running_since_s = 0.0  # since the tokens of the plan before came, if there was one
        self._progress = PrefillProgress()
        self._held: list[RequestOutput] = []  # to be told after the next submission
        self._step_tokens: list[int] = []
        self.took_memory = False  # whether the last plan made slabs or segments

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
                    self._held = [o for o in self._held if o.req_id != message.req_id]
        self._progress.forget(outputs)
        return outputs

    def _add(self, message: AddRequest) -> Sequence[RequestOutput]:
        try:
            self._scheduler.add(Request.from_message(message, self._clock()))
        except RequestError as error:
            return [RequestOutput(message.req_id, [], finish_reason="error", error=error.message)]
        if message.wants_progress:
            self._progress.watch(message.req_id)
        return ()

    def step(self) -> list[RequestOutput]:
        """One forward further; the outputs are those of the forward before. Where some of them
        were told by themselves, the next call submits and gives the others."""
        began_s = self._clock()
        self._runner.submit()
        if self._held:
            held, self._held = self._held, []
            return held
        self._runner.sample()
        plan = self._scheduler.schedule(self._clock())
        if plan is not None:
            self._runner.execute(plan)
        self.took_memory = plan is not None and plan.takes_memory
        tokens = self._runner.read()
        now_s = self._clock()
        finished, self._running = self._running, plan
        if finished is None:
            self._running_since_s = began_s
            self._runner.submit()
            return []
        awaited = self._scheduler.awaited(finished, tokens) if self._runner.submits_slowly else None
        if not awaited:
            self._runner.submit()
        step_s, self._running_since_s = now_s - self._running_since_s, now_s
        if finished.num_tokens:
            self._step_tokens.append(finished.num_tokens)
        logprobs = self._runner.read_logprobs()
        outputs = self._scheduler.update(finished, tokens, step_s, now_s, logprobs)
        outputs = self._progress.after(finished) + outputs
        self._progress.forget(outputs)
        if awaited and plan is not None:
            self._held = [output for output in outputs if output.req_id not in awaited]
            return [output for output in outputs if output.req_id in awaited]
        return outputs
