"""mlx-lm's `BatchGenerator`, which `batch_generate` and `mlx_lm.server` run on."""

from __future__ import annotations

from collections.abc import Iterator

import mlx.core as mx

from benchmarks.contenders.load import Load
from mlx_lm_server.runner.backends.blas import Blas
from mlx_lm_server.runner.seam.attention import SEAM_ERRORS


class BatchGenerate:
    """As `mlx_lm.batch_generate` sets it up, with a sampler per row where the load asks. A model
    that it cannot batch runs through mlx-lm's `generate_step`, its rows in turn."""

    kv_bytes_per_token = 0

    def __init__(self, model: str, threads: int | None, _blas: Blas) -> None:
        from mlx_lm import load

        self._model, *_ = load(model)
        why_not = self._why_not_batched()
        self._is_batched = why_not is None
        self.runs = "batched" if why_not is None else f"rows in turn: {why_not}"

    def _why_not_batched(self) -> str | None:
        """Found out as `mlx_lm.server` does, and by trying."""
        from mlx_lm.models.cache import make_prompt_cache

        caches = make_prompt_cache(self._model)
        names = sorted({type(cache).__name__ for cache in caches if not hasattr(cache, "merge")})
        if names:
            return f"{', '.join(names)} cannot be batched"
        try:
            list(self._batched(Load((3, 5), 3, 0)))
        except SEAM_ERRORS as error:
            return f"{type(error).__name__}: {error}".partition("\n")[0]
        return None

    def generate(self, load: Load) -> Iterator[list[int]]:
        return self._batched(load) if self._is_batched else self._in_turn(load)

    def _batched(self, load: Load) -> Iterator[list[int]]:
        from mlx_lm.generate import BatchGenerator
        from mlx_lm.sample_utils import make_sampler

        generator = BatchGenerator(self._model)
        samplers = [make_sampler(s.temperature, s.top_p) for s in load.sampling]
        limits = [load.output_tokens] * len(load.prompt_tokens)
        uids = generator.insert(load.prompts, limits, samplers=samplers)
        row_of = {uid: row for row, uid in enumerate(uids)}
        num_left = len(uids)
        while num_left:
            _, responses = generator.next()
            yield [row_of[response.uid] for response in responses]
            num_left -= sum(response.finish_reason is not None for response in responses)
        generator.close()

    def _in_turn(self, load: Load) -> Iterator[list[int]]:
        from mlx_lm.generate import generate_step

        streams = [
            generate_step(mx.array(prompt), self._model, max_tokens=load.output_tokens)
            for prompt in load.prompts
        ]
        for _ in range(load.output_tokens):
            for stream in streams:
                next(stream)
            yield list(range(len(streams)))
