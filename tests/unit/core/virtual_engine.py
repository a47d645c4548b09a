"""An engine loop on a virtual clock: steps take what the true costs say, times some noise."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise

from mlx_lm_server.core.cost_model import CostModel, StepCosts, StepFeatures
from mlx_lm_server.core.kv_geometry import KVGeometry
from mlx_lm_server.core.kv_layout import KVLayout
from mlx_lm_server.core.plan import RowResult, StepPlan
from mlx_lm_server.core.prefix_cache import CacheSettings, PrefixCache
from mlx_lm_server.core.request import Request
from mlx_lm_server.core.scheduler import Scheduler, SchedulerLimits

# About a 30 M float32 model on two cores.
TRUE_COSTS = StepCosts(0.014, 0.001, 0.001, 1e-6, 1.1e-6)


@dataclass(order=True)
class Arrival:
    at_s: float
    request: Request = field(compare=False)


class VirtualEngine:
    """One step ahead, as the real loop: a step is planned while the one before it runs. Steps with
    prefill take as long as with the whole `tile` of tokens that their last one is in."""

    def __init__(
        self,
        limits: SchedulerLimits,
        initial: StepCosts = TRUE_COSTS,
        noise: float = 0.0,
        seed: int = 0,
        tile: int = 1,
        truth: StepCosts = TRUE_COSTS,
    ) -> None:
        layout = KVLayout(KVGeometry(1000), 10**9, max_rows=limits.max_batch_size)
        cache = PrefixCache(CacheSettings(is_on=False), layout)
        self.scheduler = Scheduler(limits, layout, CostModel(initial), cache)
        self.times: dict[str, list[float]] = {}
        self.chunk_sizes: list[int] = []
        self.on_end: Callable[[str], Request | None] = lambda req_id: None
        self._truth = CostModel(truth)
        self._random = random.Random(seed)
        self._noise = noise
        self._tile = tile
        self._now_s = 0.0
        self._device_free_s = 0.0
        self._in_flight: list[tuple[StepPlan, float, float]] = []

    def run(self, arrivals: list[Arrival]) -> None:
        waiting = sorted(arrivals)
        while True:
            while waiting and waiting[0].at_s <= self._now_s:
                self.scheduler.add(waiting.pop(0).request)
            plan = self.scheduler.schedule(self._now_s)
            if plan is not None:
                self._start(plan)
            elif not self._in_flight:
                if not waiting:
                    return
                self._now_s = waiting[0].at_s
            while len(self._in_flight) > (0 if plan is None else 1):
                self._read()

    def ttft_s(self, req_id: str, at_s: float = 0.0) -> float:
        return self.times[req_id][0] - at_s

    def gaps_s(self, req_id: str, from_s: float = 0.0, to_s: float = 1e9) -> list[float]:
        pairs = pairwise(self.times[req_id])
        return [after - before for before, after in pairs if from_s <= before and after <= to_s]

    def _start(self, plan: StepPlan) -> None:
        step_s = 0.0
        self.chunk_sizes += [chunk.num_tokens for chunk in plan.chunks]
        if plan.decodes or plan.chunks:
            factor = max(0.5, 1 + self._random.gauss(0, self._noise))
            step_s = self._truth.forecast_s(self._whole_tiles(StepFeatures.of(plan))) * factor
        self._device_free_s = max(self._device_free_s, self._now_s) + step_s
        self._in_flight.append((plan, step_s, self._device_free_s))

    def _whole_tiles(self, step: StepFeatures) -> StepFeatures:
        num_tokens = step.rows + step.prefill_tokens
        missing = -num_tokens % self._tile if step.prefill_tokens else 0
        return step._replace(prefill_tokens=step.prefill_tokens + missing)

    def _read(self) -> None:
        plan, step_s, end_s = self._in_flight.pop(0)
        self._now_s = max(self._now_s, end_s)
        result = {work.row: RowResult((3,)) for work in plan.sampling}
        outputs = self.scheduler.update(plan, result, self._now_s)
        self.scheduler.end_step(plan, step_s or None)
        for output in outputs:
            self.times.setdefault(output.req_id, []).append(self._now_s)
            following = self.on_end(output.req_id) if output.finish_reason else None
            if following is not None:
                self.scheduler.add(following)
