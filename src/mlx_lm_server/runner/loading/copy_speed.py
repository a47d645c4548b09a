"""Measures how fast a row's K and V are copied on the device, as a row that leaves is copied."""

from __future__ import annotations

import time
from collections.abc import Callable

import mlx.core as mx

from mlx_lm_server.core.plan import CreateSlab, MoveRow
from mlx_lm_server.runner.loading.tiny_plans import SMALL_SLAB, scratch
from mlx_lm_server.runner.state.kv_storage import KVStorage

# Copies grow until one takes so long that its bytes count, and not that it was asked for.
LEAST_COPY_S = 0.002
FIRST_BYTES, MOST_BYTES, GROWTH = 1 << 20, 64 << 20, 4
# No slot is longer; of windows alone a longer one holds no more.
MOST_TOKENS = 1 << 17


def copy_bytes_per_s(storage: KVStorage, has_time: Callable[[], bool] = lambda: True) -> float:
    """Returns how many bytes a second are copied from place to place. Each of them is read and
    written, by operations twice."""
    num_bytes = FIRST_BYTES
    while True:
        taken_s = _taken_s(storage, num_bytes)
        if taken_s >= LEAST_COPY_S or num_bytes >= MOST_BYTES or not has_time():
            return num_bytes / max(taken_s, 1e-9)
        num_bytes *= GROWTH


def _taken_s(storage: KVStorage, num_bytes: int) -> float:
    """Returns the seconds of the faster of two copies of about so many bytes: the first finds
    memory that nobody has touched."""
    num_tokens = storage.geometry.tokens_in(num_bytes, MOST_TOKENS) if storage.layers else 0
    if not num_tokens:
        return _of_any_array(num_bytes)
    with scratch(storage, CreateSlab(SMALL_SLAB, 2, num_tokens)):
        storage.stages.run()
        move = MoveRow(SMALL_SLAB, 0, SMALL_SLAB, 1, num_tokens)
        copied_s = min(_of_row(storage, move) for _ in range(2))
    return copied_s * num_bytes / storage.geometry.slot_bytes(num_tokens)


def _of_row(storage: KVStorage, move: MoveRow) -> float:
    begun = time.perf_counter()
    storage.apply(move)
    storage.stages.run()
    return time.perf_counter() - begun


def _of_any_array(num_bytes: int) -> float:
    """Returns the seconds where no layer keeps K and V in slabs."""
    source = mx.zeros((num_bytes // 2,), mx.uint8)
    mx.eval(source)

    def copied_s() -> float:
        begun = time.perf_counter()
        mx.eval(mx.concatenate([source, source]))
        return time.perf_counter() - begun

    return min(copied_s() for _ in range(2))
