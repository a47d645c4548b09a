"""Our engine as it is, without a server around it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from itertools import islice

from benchmarks.contenders.load import Load
from mlx_lm_server.engine.assembly import assemble
from mlx_lm_server.protocol import AddRequest, LoadModel
from mlx_lm_server.runner.backends.blas import Blas
from mlx_lm_server.runner.seam import replays


class Engine:
    """`EngineCore` stepped by hand. Must be made and used on one thread."""

    itl_goal_s: float | None = None

    def __init__(self, model: str, threads: int | None, blas: Blas) -> None:
        order = LoadModel(model, num_threads=threads, itl_goal_s=self.itl_goal_s)
        self._core, ready = assemble(order, blas, lambda _stage, _fraction: None)
        self.runs = ready.batching
        self.kv_bytes_per_token = ready.kv_bytes_per_token

    def generate(self, load: Load) -> Iterator[list[int]]:
        rows = enumerate(zip(load.prompts, load.sampling, strict=True))
        requests = (AddRequest(str(row), prompt, sampling) for row, (prompt, sampling) in rows)
        self._core.handle(islice(requests, load.num_in_flight or None))
        while self._core.has_work:
            outputs = self._core.step()
            yield [int(output.req_id) for output in outputs]
            num_ended = sum(output.finish_reason is not None for output in outputs)
            self._core.handle(islice(requests, num_ended))


class UnhurriedEngine(Engine):
    """Prefills in whole budgets, whoever waits, so that all rows soon decode together."""

    itl_goal_s = 60.0


class BuildingEngine(Engine):
    """Builds the graph of every forward anew."""

    def __init__(self, model: str, threads: int | None, blas: Blas) -> None:
        replays.TIMES_BUILT = sys.maxsize
        super().__init__(model, threads, blas)
