"""How many prompt tokens a step takes, and whose: chunked prefill without stalls.

While rows decode, the step may take as long as the ITL goal; the cost model says how many prefill
tokens that allows (Sarathi-Serve, Agrawal et al. 2024, with time in place of a token count). They
are shared so that a short prompt does not wait behind a long one and a long one always goes on:
the oldest prompt gets a quarter, the rest goes to the prompts with the least left. Where products
take tokens in tiles, all of that is rounded down to whole ones.

A token in a small chunk costs a little more than one in the large chunks of an idle machine, so a
long prompt beside decoding rows starts small and grows by at most half from step to step
(`ramp_tokens`), while the model learns.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType

from mlx_lm_server.core.cost_model import CostModel, StepFeatures
from mlx_lm_server.core.request import Request
from mlx_lm_server.core.scheduler_limits import SchedulerLimits

OLDEST_PROMPT_SHARE = 0.25
MAX_TAIL_SHARE = 0.25

NO_ENDS: Mapping[Request, int] = MappingProxyType({})


class PrefillPlan:
    """The prefill chunks of one step as they are granted. Lives within one `schedule` call."""

    def __init__(
        self,
        limits: SchedulerLimits,
        cost_model: CostModel,
        decode: StepFeatures,
        ramp_tokens: int,
        copied_tokens: int = 0,
    ) -> None:
        """Of a step that decodes so much, for which so many tokens are loaded from the cache."""
        self._limits = limits
        self._cost_model = cost_model
        self._num_decodes = decode.rows
        self._prompts_per_row = 0.0
        self._ramp_tokens = ramp_tokens
        self._features = decode._replace(copied_tokens=copied_tokens)  # and what is granted so far
        self._decode_step_s = cost_model.forecast_s(decode)
        self._tokens_left = limits.max_num_batched_tokens - decode.rows - decode.prefill_tokens
        self._granted: dict[Request, int] = {}
        self._ends: Mapping[Request, int] = {}

    def share_out(
        self, prefilling: Sequence[Request], ends: Mapping[Request, int] = NO_ENDS
    ) -> list[tuple[Request, int]]:
        """Returns token counts per request; `prefilling` comes with the most urgent first. `ends`
        says where the next chunk of a request has to end at the latest, if anywhere."""
        self._ends = ends
        if not prefilling:
            return []
        self._prompts_per_row = len(prefilling) / max(1, self._num_decodes)
        oldest, *others = self._chosen(prefilling)
        self._grant(oldest, OLDEST_PROMPT_SHARE if others else 1.0)
        for request in sorted([oldest, *others], key=_least_left_first):
            self._grant(request, 1.0)
        return list(self._granted.items())

    def _chosen(self, prefilling: Sequence[Request]) -> list[Request]:
        """The oldest and those with the least left, within `prefill_batch_size`."""
        oldest, *others = prefilling
        if self._limits.prefill_batch_size is None:
            return [oldest, *others]
        others.sort(key=_least_left_first)
        return [oldest, *others[: self._limits.prefill_batch_size - 1]]

    def _grant(self, request: Request, share: float) -> None:
        """Let the request have up to this share of what the step has left."""
        had = self._granted.get(request, 0)
        wanted = self._wanted(request) - had
        minimum = min(wanted, self._limits.min_chunk_tokens)
        num_tokens = min(
            wanted,
            int(share * self._tokens_left),
            self._affordable(request, share),
            self._within_pairs(request.num_computed_tokens + had),
        )
        if num_tokens < minimum:
            num_tokens = 0 if self._granted else minimum
        if self._is_short(request) and wanted - num_tokens <= MAX_TAIL_SHARE * (had + num_tokens):
            num_tokens = wanted
        num_tokens = min(num_tokens, self._tokens_left)
        if num_tokens > 0:
            start = request.num_computed_tokens + had
            self._features = self._features.with_chunk(start, num_tokens)
            self._granted[request] = had + num_tokens
            self._tokens_left -= num_tokens

    def _wanted(self, request: Request) -> int:
        left = request.num_prefill_tokens_left
        if request in self._ends:
            left = min(left, self._ends[request] - request.num_computed_tokens)
        return min(left, self._limits.prefill_step_size or left)

    def _affordable(self, request: Request, share: float) -> int:
        """Tokens that keep the step within its goal; unbounded where nobody decodes."""
        if not self._num_decodes:
            return self._tokens_left
        goal_s = self._limits.step_goal_s(
            self._decode_step_s,
            is_short=self._is_short(request),
            prompts_per_row=self._prompts_per_row,
        )
        slack_s = share * (goal_s - self._cost_model.forecast_s(self._features))
        context = request.num_computed_tokens + self._granted.get(request, 0)
        num_tokens = self._cost_model.max_chunk_tokens(slack_s, context)
        if self._is_short(request):
            return num_tokens
        num_tokens = min(num_tokens, max(0, self._ramp_tokens - sum(self._granted.values())))
        if self._limits.itl_goal_s is not None:
            return num_tokens
        return self._whole_tiles(num_tokens)

    def _within_pairs(self, start: int) -> int:
        """Returns how many tokens from there on attend to as many as a step's may."""
        left = max(0.0, self._limits.max_prefill_pairs - self._features.prefill_pairs)
        if math.isinf(left):
            return self._tokens_left
        near = start + 0.5
        return int(math.sqrt(near * near + 2 * left) - near)

    def _whole_tiles(self, num_tokens: int) -> int:
        """The largest number up to this that makes the tokens of the step whole tiles; the number
        itself where that would be less than a chunk has at least."""
        tile = self._limits.token_tile
        others = self._num_decodes + sum(self._granted.values())
        whole = (others + num_tokens) // tile * tile - others
        return num_tokens if whole < self._limits.min_chunk_tokens else whole

    def _is_short(self, request: Request) -> bool:
        return request.prefill_until <= self._limits.short_prompt_tokens


def _least_left_first(request: Request) -> tuple[int, int, int]:
    return (-request.priority, request.num_prefill_tokens_left, request.arrival_order)
