"""Drives an engine in this process: requests in, tokens out."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median

import mlx.core as mx
import msgspec

from mlx_lm_server.core.measured import Measured
from mlx_lm_server.core.proposer import Proposer
from mlx_lm_server.engine.assembly import assemble
from mlx_lm_server.engine.engine_core import EngineCore
from mlx_lm_server.protocol import (
    Abort,
    AddRequest,
    CacheReport,
    LoadModel,
    RequestOutput,
    SamplingParams,
    TokenLogprobs,
)
from mlx_lm_server.runner.backends.blas import Blas
from tests.back_ends import SUBMISSION, WAY

__all__ = ["GREEDY", "EngineDriver", "random_prompts"]

GREEDY = SamplingParams(max_tokens=24, seed=0, temperature=0.0)


def random_prompts(seed: int, lengths: Sequence[int], vocab_size: int) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(1, vocab_size) for _ in range(n)] for n in lengths]


class EngineDriver:
    """An engine core with its outputs collected by request."""

    def __init__(
        self,
        model: Path,
        proposer: Proposer | None = None,
        measured: Measured | None = None,
        **order: object,
    ) -> None:
        order["way"] = order.get("way") or WAY
        order.setdefault("submission", SUBMISSION)
        message = msgspec.structs.replace(LoadModel(str(model)), **order)
        self.core: EngineCore
        self.core, self.ready = assemble(
            message,
            Blas("test"),
            lambda _stage, _fraction: None,
            proposer=proposer,
            measured=measured,
        )
        self.tokens: dict[str, list[int]] = {}
        self.reasons: dict[str, list[str]] = {}
        self.logprobs: dict[str, list[TokenLogprobs]] = {}
        self.reports: dict[str, CacheReport] = {}

    def add(
        self, req_id: str, prompt: list[int], sampling: SamplingParams = GREEDY, **more: object
    ) -> None:
        self.tokens[req_id] = []
        self._collect(self.core.handle([AddRequest(req_id, prompt, sampling, **more)]))

    def abort(self, req_id: str) -> None:
        self._collect(self.core.handle([Abort(req_id)]))

    def step(self) -> None:
        if self.core.waits_for_tier:
            time.sleep(0.001)
        self._collect(self.core.step())

    def usual_peak_bytes(self, num_steps: int = 20) -> int:
        """Memory that a step takes for itself: the median, since on a busy machine MLX now and
        then allocates a whole forward ahead of its execution."""
        peaks = []
        for _ in range(num_steps):
            mx.reset_peak_memory()
            before = mx.get_active_memory()
            self.step()
            peaks.append(mx.get_peak_memory() - before)
        return int(median(peaks))

    def finish(self) -> None:
        while self.core.has_work:
            self.step()

    def run(
        self, prompts: Sequence[list[int]], sampling: SamplingParams = GREEDY
    ) -> list[list[int]]:
        """All prompts at once."""
        return self.run_each([(prompt, sampling) for prompt in prompts])

    def run_each(self, jobs: Sequence[tuple[list[int], SamplingParams]]) -> list[list[int]]:
        names = [f"run-{len(self.tokens)}-{i}" for i in range(len(jobs))]
        for name, (prompt, sampling) in zip(names, jobs, strict=True):
            self.add(name, prompt, sampling)
        self.finish()
        return [self.tokens[name] for name in names]

    def _collect(self, outputs: Sequence[RequestOutput]) -> None:
        for output in outputs:
            self.tokens[output.req_id].extend(output.token_ids)
            self.logprobs.setdefault(output.req_id, []).extend(output.logprobs or ())
            if output.cache is not None:
                self.reports[output.req_id] = output.cache
            if output.finish_reason is not None:
                self.reasons.setdefault(output.req_id, []).append(output.finish_reason)
