"""Decode loops with nothing around the forward: no scheduler, no sampler, argmax.

`BareLoop` has our packed forward, so what the engine adds to it shows; `PlainLoop` has mlx-lm's
forward as it ships, over rows of equal length.
"""

from __future__ import annotations

from collections.abc import Iterator

import mlx.core as mx

from benchmarks.contenders.load import Load
from mlx_lm_server.core.kv_layout import DEFAULT_RULES
from mlx_lm_server.core.plan import CreateSlab, DropSlab, RowWork, StepPlan
from mlx_lm_server.protocol import LoadModel
from mlx_lm_server.runner.backends import host_memory
from mlx_lm_server.runner.backends.blas import Blas
from mlx_lm_server.runner.backends.choose import choose
from mlx_lm_server.runner.loading import loader
from mlx_lm_server.runner.seam.forwards import PackedForward
from mlx_lm_server.runner.state.kv_storage import KVStorage

SLAB = 0


class BareLoop:
    """All rows in one slab from the start, one forward and one argmax a step, read a step late."""

    runs = "packed"

    def __init__(self, model: str, threads: int | None, _blas: Blas) -> None:
        host_memory.keep_freed_blocks()
        order, backend = LoadModel(model, num_threads=threads), choose()
        self._loaded = loader.load(order, backend, lambda _s, _f: None)
        state = self._loaded.state
        assert state is not None, self._loaded.why_no_state
        self.storage = KVStorage(state.kv, backend)
        kernel = backend.kernel(self._loaded.kv_dtype)
        self._packed = PackedForward(self._loaded.lm, state, self.storage, kernel)
        self.kv_bytes_per_token = self.storage.bytes_per_token

    def generate(self, load: Load) -> Iterator[list[int]]:
        rows = list(range(len(load.prompt_tokens)))
        capacity = DEFAULT_RULES.capacity_for(max(load.prompt_tokens) + load.output_tokens)
        self.storage.apply(CreateSlab(SLAB, len(rows), capacity))
        tokens = mx.concatenate([self.prefill(row, ids) for row, ids in enumerate(load.prompts)])
        mx.eval(tokens)
        yield rows
        for step in range(load.output_tokens - 1):
            decodes = tuple(
                RowWork(row, SLAB, row, length + step)
                for row, length in enumerate(load.prompt_tokens)
            )
            before, tokens = tokens, self._forward(decodes, (), tokens)
            before.tolist()  # the next graph is built; slabs are free to be written in place
            mx.async_eval(tokens)
            if step:
                yield rows
        if load.output_tokens > 1:
            tokens.tolist()
            yield rows
        self.storage.apply(DropSlab(SLAB))

    def prefill(self, row: int, ids: list[int], start: int = 0) -> mx.array:
        """The token after these, which come after `start` others."""
        chunk = RowWork(row, SLAB, row, start, tuple(ids), yields=1)
        return self._forward((), (chunk,), mx.array(ids, mx.int32))[-1:]

    def _forward(
        self, decodes: tuple[RowWork, ...], chunks: tuple[RowWork, ...], ids: mx.array
    ) -> mx.array:
        plan = StepPlan(0, (), (), (), decodes, chunks)
        logits = self._packed.run(plan, ids).result
        return mx.argmax(logits, axis=-1).astype(mx.int32)


class PlainLoop:
    """mlx-lm's model and cache, untouched."""

    runs = "batched"
    kv_bytes_per_token = 0

    def __init__(self, model: str, threads: int | None, _blas: Blas) -> None:
        from mlx_lm import load

        self._model, *_ = load(model)

    def generate(self, load: Load) -> Iterator[list[int]]:
        from mlx_lm.models.cache import make_prompt_cache

        rows = list(range(len(load.prompt_tokens)))
        cache = make_prompt_cache(self._model)
        tokens = self._next(mx.array(load.prompts, mx.int32), cache)
        mx.eval(tokens)
        yield rows
        for step in range(load.output_tokens - 1):
            before, tokens = tokens, self._next(tokens[:, None], cache)
            mx.async_eval(tokens)
            before.tolist()
            if step:
                yield rows
        if load.output_tokens > 1:
            tokens.tolist()
            yield rows

    def _next(self, ids: mx.array, cache: list[object]) -> mx.array:
        return mx.argmax(self._model(ids, cache=cache)[:, -1], axis=-1)
