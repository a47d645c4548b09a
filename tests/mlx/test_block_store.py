"""A checkpoint takes what the ledger counts for it, for as long as it is kept, and is told as it
is."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import mlx.core as mx
import pytest

from mlx_lm_server.core.plan import CreateSlab, DropState, OffloadState, SaveState
from mlx_lm_server.core.tier import Label
from mlx_lm_server.runner.state.block_store import BlockStore
from mlx_lm_server.runner.state.cache_kinds import ArrayShape, RecurrentState
from mlx_lm_server.runner.state.kv_storage import KVStorage, LayerShape
from mlx_lm_server.runner.state.row_states import RowStates
from mlx_lm_server.tier import Record
from tests.back_ends import BACKEND

from .kept_records import KeptRecords

pytestmark = pytest.mark.each_way

BLOCK, WINDOW, ROW = 4, 20, 3
LAYERS = [LayerShape(2, 8, 8, window=WINDOW), LayerShape(2, 8, 8)]
PART = RecurrentState((ArrayShape((5,), mx.float32),))


class Cache:
    """A row of a model with a window and recurrent state, and what was offloaded of it."""

    def __init__(self, dtype: mx.Dtype = mx.float32) -> None:
        self.storage = KVStorage(LAYERS, BACKEND)
        self.storage.apply(CreateSlab(0, 2, 100))
        states = RowStates([PART])
        states.put([ROW], [SimpleNamespace(cache=[mx.ones((1, 5), dtype)])])
        self.blocks = BlockStore(self.storage, states, BLOCK)
        self.blocks.tier = self.kept = KeptRecords()

    @property
    def records(self) -> list[Record]:
        return self.kept.all

    def save(self, num_tokens: int) -> None:
        self.blocks.save(SaveState(0, ROW, 0, 1, num_tokens))

    def offload(self, num_tokens: int) -> None:
        ids = tuple(range(num_tokens))
        self.blocks.save(OffloadState(0, Label.of_state(b"parent", ids, num_tokens)))
        self.storage.stages.run()


@pytest.mark.parametrize("num_tokens", [10, WINDOW + 8, 90])
def test_a_checkpoint_takes_what_the_ledger_counts_until_it_is_dropped(num_tokens: int) -> None:
    cache = Cache()
    cache.save(num_tokens)
    geometry = replace(cache.storage.geometry, bytes_per_row=PART.nbytes)
    assert cache.blocks.nbytes == geometry.state_bytes(num_tokens)
    cache.blocks.save(DropState(0))
    assert cache.blocks.nbytes == 0


def test_a_checkpoint_of_other_arrays_than_the_model_usually_has_is_not_offloaded() -> None:
    usual, unusual = Cache(), Cache(mx.float16)
    for cache in (usual, unusual):
        cache.save(10)
        cache.offload(10)
    assert len(usual.records) == 1
    assert not unusual.records
