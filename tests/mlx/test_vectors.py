"""A row can give a vector of its hidden states: the model's own, however its text is cut."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.cache import make_prompt_cache

from mlx_lm_server.core.plan import CreateSlab, JoinedRow, Pooling, RowResult, RowWork, StepPlan
from mlx_lm_server.protocol import LoadModel
from mlx_lm_server.runner.loading import loader
from mlx_lm_server.runner.model_runner import ModelRunner
from tests.back_ends import BACKEND

from .driver import GREEDY, random_prompts
from .tiny_models import VOCAB_SIZE, write_model

TEXTS = [tuple(ids) for ids in random_prompts(4, (23, 9), VOCAB_SIZE)]


def runner_of(folder: Path) -> ModelRunner:
    loaded = loader.load(LoadModel(str(folder)), BACKEND, lambda _stage, _fraction: None)
    return ModelRunner(loaded, BACKEND, 3)


def results_of(runner: ModelRunner, pooling: Pooling, size: int) -> dict[int, RowResult]:
    """Two texts in pieces, beside a row that reads the first one for a token."""
    joined = tuple(JoinedRow(f"{row}", row, TEXTS[row % 2], (), GREEDY) for row in range(3))
    found: dict[int, RowResult] = {}
    for start in range(0, len(TEXTS[0]), size):
        works = []
        for row in range(3):
            text, kind = TEXTS[row % 2], pooling if row < 2 else None
            piece = text[start : start + size]
            is_last = start + size >= len(text)
            if piece:
                works.append(RowWork(row, 0, row, start, piece, int(is_last), pooling=kind))
        plan = StepPlan(
            0,
            joined_rows=() if start else joined,
            kv_ops=() if start else (CreateSlab(0, 3, 64),),
            chunks=tuple(works),
        )
        for result in runner.submit(plan).collect():
            found.update(result)
    for result in runner.submit(StepPlan(0, left_rows=(0, 1, 2))).collect():
        assert not result
    return found


def expected(runner: ModelRunner, text: tuple[int, ...], pooling: Pooling) -> np.ndarray:
    """The states of mlx-lm's backbone, of the whole text and with caches of its own."""
    model = runner._loaded.lm.model
    backbone = getattr(model, "language_model", model).model
    states = backbone(mx.array([text]), cache=make_prompt_cache(model))
    found = np.array(states.astype(mx.float32))[0]
    return found[-1] if pooling == "last" else found.mean(axis=0)


@pytest.mark.parametrize("size", [64, 7])
@pytest.mark.parametrize("pooling", ["last", "mean"])
@pytest.mark.parametrize("family", ["qwen3", "gemma3_text", "qwen3_5"])
def test_a_vector_is_that_of_the_model_whole_or_in_pieces(
    family: str, pooling: Pooling, size: int, tmp_path: Path
) -> None:
    runner = runner_of(write_model(family, tmp_path))
    assert runner.can_pool
    found = results_of(runner, pooling, size)
    for row in (0, 1):
        assert found[row].token_ids == ()
        assert np.allclose(found[row].vector, expected(runner, TEXTS[row], pooling), atol=1e-4)
    assert len(found[2].token_ids) == 1
    assert found[2].vector is None
    assert not runner._sums
