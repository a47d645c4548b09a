"""How many cached tokens a step loads: beside decoding rows no more than the goal of a step leaves
time for, as with prompt tokens (prefill.py). So a long conversation that comes back does not hold
up its neighbours."""

from __future__ import annotations

from mlx_lm_server.core.cost_model import CostModel, StepFeatures
from mlx_lm_server.core.hit import Hit
from mlx_lm_server.core.request import Request
from mlx_lm_server.core.scheduler_limits import SchedulerLimits


class LoadPlan:
    """What the requests of one step take from the cache, in the order in which they ask; the first
    one is given something whatever the goal. Lives within one `schedule` call. `unfinished` are
    those that find more of it in the next step, so that they compute nothing."""

    def __init__(
        self, limits: SchedulerLimits, cost_model: CostModel, decode: StepFeatures
    ) -> None:
        self._least = limits.min_loaded_tokens
        self._tokens_left: int | None = None  # where nobody decodes
        if decode.rows:
            decode_s = cost_model.forecast_s(decode)
            goal_s = limits.step_goal_s(decode_s, is_short=False)
            self._tokens_left = cost_model.max_copied_tokens(goal_s - decode_s)
        self.num_tokens = 0
        self.unfinished: set[Request] = set()

    def cut(self, request: Request, hit: Hit) -> Hit | None:
        """As much of the hit as the request takes in this step, if any."""
        part: Hit | None = hit
        if self._tokens_left is not None and self.num_tokens:
            part = hit.within(self._tokens_left - self.num_tokens)
        elif self._tokens_left is not None:
            part = hit.within(max(self._least, self._tokens_left)) or hit.first_block
        if part is None or part.stop < hit.stop:
            self.unfinished.add(request)
        if part is not None:
            self.num_tokens += part.stop - part.start
        return part
