"""mlx-lm's `BatchGenerator`, which `batch_generate` and `mlx_lm.server` run on."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.contenders.load import Load
from mlx_lm_server.runner.blas import Blas


class BatchGenerate:
    """As `mlx_lm.batch_generate` sets it up, with a sampler per row where the load asks."""

    kv_bytes_per_token = 0

    def __init__(self, model: str, threads: int | None, _blas: Blas) -> None:
        from mlx_lm import load

        self._model, *_ = load(model)

    def generate(self, load: Load) -> Iterator[list[int]]:
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
