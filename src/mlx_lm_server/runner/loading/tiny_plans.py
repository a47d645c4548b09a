"""Plans that the engine makes for itself while a model is loaded, and slabs for them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from mlx_lm_server.core.plan import CreateSlab, DropSlab, RowWork, StepPlan
from mlx_lm_server.runner.state.kv_storage import KVStorage

SMALL_SLAB, LARGE_SLAB = -2, -1


def plan_of(decodes: Sequence[RowWork] = (), chunks: Sequence[RowWork] = ()) -> StepPlan:
    """Returns a plan of nothing but rows that decode and chunks."""
    return StepPlan(0, decodes=tuple(decodes), chunks=tuple(chunks))


def decode_of(row: int, position: int) -> RowWork:
    """Returns the work of a row whose token is pending."""
    return RowWork(row, *_slab_of(row), position)


def chunk_of(row: int, start: int, num_tokens: int, yields: int = 1) -> RowWork:
    """Returns the work of a row whose tokens are known."""
    ids = tuple(token_of(row, start + i) for i in range(num_tokens))
    return RowWork(row, *_slab_of(row), start, ids, yields)


def token_of(row: int, position: int) -> int:
    return (7 * position + 13 * row + 3) % 101


def _slab_of(row: int) -> tuple[int, int]:
    """Rows 0 and 1 share the small slab, 2 and 3 the large one."""
    return (SMALL_SLAB, row) if row < 2 else (LARGE_SLAB, row - 2)


@contextmanager
def scratch(storage: KVStorage, *slabs: CreateSlab) -> Iterator[None]:
    """Makes slabs for as long as it is entered; plans may jump to places before which nobody
    wrote."""
    needs_zeros, storage.needs_zeros = storage.needs_zeros, True
    for slab in slabs:
        storage.apply(slab)
    storage.needs_zeros = needs_zeros
    try:
        yield
    finally:
        for slab in slabs:
            storage.apply(DropSlab(slab.slab_id))
