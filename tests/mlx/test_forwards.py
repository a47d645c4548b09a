from __future__ import annotations

import gc
import weakref
from typing import Any, cast

import mlx.core as mx
import pytest

from mlx_lm_server.core.plan import RowWork, StepPlan
from mlx_lm_server.runner.seam.forwards import AloneForward
from mlx_lm_server.runner.seam.language_model import LanguageModel

pytestmark = pytest.mark.each_way


class OneLayer:
    """A model whose one layer keeps its tokens as they are."""

    layers = (None,)


class LanguageModelOfOneLayer:
    """Notes the caches that it is given."""

    model = OneLayer()

    def __init__(self) -> None:
        self.caches: list[Any] = []

    def run(self, ids: mx.array, caches: list[Any], _positions: Any) -> tuple[mx.array, mx.array]:
        self.caches += [weakref.ref(cache) for cache in caches]
        tokens = mx.zeros((1, 1, ids.size, 4))
        caches[0].update_and_fetch(tokens, tokens)
        return mx.zeros((1, 8)), mx.zeros((1, ids.size, 4))


def test_a_row_that_leaves_takes_its_cache_with_it() -> None:
    lm = LanguageModelOfOneLayer()
    forward = AloneForward(cast(LanguageModel, lm))
    chunks = tuple(RowWork(row, 0, row, 0, (1, 2), yields=1) for row in (0, 1))
    forward.run(StepPlan(1, chunks=chunks), mx.zeros((4,), mx.int32))
    forward.forget([1])
    gc.collect()
    assert [cache() is not None for cache in lm.caches] == [True, False]
