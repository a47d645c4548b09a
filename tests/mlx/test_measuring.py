"""What is measured at load, beside what forwards cost."""

from __future__ import annotations

import time
from collections.abc import Sequence

import pytest

from mlx_lm_server.core.plan import KVOp, MoveRow
from mlx_lm_server.runner.loading.copy_speed import FIRST_BYTES, copy_bytes_per_s
from mlx_lm_server.runner.state.kv_storage import KVStorage, LayerShape
from tests.back_ends import BACKEND

pytestmark = pytest.mark.each_way

SLOW_S = 0.02


class SlowStorage(KVStorage):
    """Takes its time for each row that it moves."""

    def apply(self, op: KVOp) -> None:
        super().apply(op)
        if isinstance(op, MoveRow):
            time.sleep(SLOW_S)


LAYERS = [LayerShape(2, 64, 64), LayerShape(2, 64, 64, window=32)]


@pytest.mark.parametrize("layers", [LAYERS, LAYERS[1:], []])
def test_copies_are_timed_and_leave_nothing(layers: Sequence[LayerShape]) -> None:
    storage = KVStorage(layers, BACKEND)
    assert 1e7 < copy_bytes_per_s(storage) < 1e13
    assert storage.slabs == {}
    assert storage.stages.are_short


def test_the_speed_is_of_the_copies_that_rows_are_moved_by() -> None:
    assert copy_bytes_per_s(SlowStorage(LAYERS, BACKEND)) < FIRST_BYTES / SLOW_S


def test_one_size_is_copied_where_there_is_no_time() -> None:
    tried: list[int] = []

    def no_time() -> bool:
        tried.append(1)
        return False

    assert copy_bytes_per_s(KVStorage(LAYERS, BACKEND), no_time) > 0
    assert len(tried) <= 1
