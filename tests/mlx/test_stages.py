"""Between two forwards arrays are read as they were when that was ordered, and then written in
place."""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx
import pytest

from mlx_lm_server.core.block import Place
from mlx_lm_server.core.plan import (
    CreateSegment,
    CreateSlab,
    DropSlab,
    MoveBlocks,
    MoveRow,
    OffloadBlocks,
    OffloadTokens,
    ResizeSlab,
    RestoreBlocks,
    SaveBlocks,
)
from mlx_lm_server.core.tier import Label
from mlx_lm_server.runner import plane_spans
from mlx_lm_server.runner.block_store import BlockStore
from mlx_lm_server.runner.kv_storage import KVStorage, LayerShape
from mlx_lm_server.runner.record_bytes import read_array
from mlx_lm_server.runner.stages import ends_of
from mlx_lm_server.tier import Record

BLOCK, SLOTS = 4, 3


class Cache:
    """A slab of random K and V of two layers, and what was offloaded."""

    def __init__(self, capacity: int = 18, dim: int = 8) -> None:
        self.storage = KVStorage([LayerShape(2, dim, dim)] * 2)
        self.blocks = BlockStore(self.storage, None, BLOCK)
        self.records: list[Record] = []
        self.blocks.offload = self.records.append
        self.storage.apply(CreateSlab(0, SLOTS, capacity))
        for planes in self.storage.slabs[0].planes:
            planes[:] = [mx.random.normal(plane.shape) for plane in planes]
        mx.eval(self.planes)

    @property
    def planes(self) -> list[mx.array]:
        """In the order of a block's record."""
        return [plane for planes in self.storage.slabs[0].planes for plane in planes]

    def tokens(self, slot: int, start: int, stop: int) -> mx.array:
        copy = mx.stack([plane[slot, :, start:stop] for plane in self.planes])
        mx.eval(copy)
        return copy

    def overwrite(self) -> None:
        for plane in self.planes:
            plane[:, :, :15] = 7.0

    def check(self, *wanted: mx.array) -> None:
        for record, tokens in zip(self.records, wanted, strict=True):
            (tensor,) = record.tensors
            assert mx.array_equal(read_array(tensor), tokens).item()


def label(number: int, num_tokens: int = BLOCK) -> Label:
    return Label(bytes([number]) * 32, b"", (1,) * num_tokens, num_tokens)


def drop(cache: Cache) -> None:
    cache.storage.apply(DropSlab(0))


def shrink(cache: Cache) -> None:
    cache.storage.apply(ResizeSlab(0, 1))


def move_another_row_there(cache: Cache) -> None:
    cache.storage.apply(MoveRow(0, 0, 0, 2, 17))


@pytest.mark.parametrize("change", [Cache.overwrite, drop, shrink, move_another_row_there])
def test_blocks_of_rows_are_offloaded_as_they_were(change: Callable[[Cache], None]) -> None:
    cache = Cache()
    wanted = [cache.tokens(2, 0, 4), cache.tokens(2, 12, 16), cache.tokens(1, 8, 12)]
    labels = tuple(map(label, range(3)))
    cache.blocks.save(OffloadTokens(0, (2, 2, 1), (0, 3, 2), labels))
    change(cache)
    cache.storage.stages.run()
    cache.check(*wanted)


def test_blocks_of_the_pool_are_offloaded_as_they_were() -> None:
    """What was saved before in the same plan, in two segments, the last block filled in part."""
    cache = Cache()
    wanted = [cache.tokens(1, 0, 4), cache.tokens(1, 4, 8), cache.tokens(1, 8, 11)]
    places = (Place(0, 1), Place(1, 0), Place(1, 2))
    for segment_id in range(2):
        cache.blocks.save(CreateSegment(segment_id, 3))
    cache.blocks.save(SaveBlocks(0, 1, 0, 11, places))
    cache.blocks.save(OffloadBlocks(places, (label(0), label(1), label(2, 3))))
    cache.blocks.save(MoveBlocks(((Place(0, 0), Place(1, 0)), (Place(0, 0), Place(0, 1)))))
    cache.overwrite()
    cache.storage.stages.run()
    cache.check(*wanted)


def test_an_offload_lets_the_slab_be_written_in_place() -> None:
    cache = Cache(capacity=4096, dim=64)
    held = cache.storage.nbytes
    cache.blocks.save(OffloadTokens(0, (1,), (5,), (label(0),)))
    move_another_row_there(cache)
    cache.overwrite()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    cache.storage.stages.run()
    mx.eval(cache.planes)
    assert mx.get_peak_memory() - before < held / 16


def test_only_a_few_blocks_to_read_are_short() -> None:
    cache = Cache(capacity=4096, dim=64)
    stages = cache.storage.stages
    few, many = tuple(map(label, range(2))), tuple(map(label, range(200)))
    assert stages.are_short
    cache.blocks.save(OffloadTokens(0, (1, 1), (5, 6), few))
    assert stages.are_short
    cache.blocks.save(OffloadTokens(0, (1,) * 200, tuple(range(200)), many))
    assert stages.are_short, "0.8 MB"
    for _ in range(5):
        cache.blocks.save(OffloadTokens(0, (1,) * 200, tuple(range(200)), many))
    assert not stages.are_short
    stages.run()
    assert stages.are_short
    cache.blocks.save(CreateSegment(0, 3))
    cache.blocks.save(SaveBlocks(0, 1, 0, 11, (Place(0, 0), Place(0, 1), Place(0, 2))))
    assert stages.are_short
    cache.blocks.save(MoveBlocks(((Place(0, 0), Place(0, 1)),)))
    assert not stages.are_short, "copies that MLX makes are waited for"


@pytest.mark.parametrize("is_in_host_memory", [True, False])
def test_restored_blocks_are_moved_with_what_came_back(
    is_in_host_memory: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plane_spans, "is_in_host_memory", lambda: is_in_host_memory)
    cache = Cache()
    wanted = [cache.tokens(2, 0, 4), cache.tokens(2, 12, 16)]
    cache.blocks.save(OffloadTokens(0, (2, 2), (0, 3), (label(0), label(1))))
    cache.storage.stages.run()
    records = tuple(cache.records)
    cache.records.clear()
    for segment_id in range(2):
        cache.blocks.save(CreateSegment(segment_id, 3))
    came, moved = (Place(0, 1), Place(0, 2)), (Place(1, 0), Place(0, 0))
    cache.blocks.save(RestoreBlocks(came, records))
    cache.blocks.save(MoveBlocks(tuple(zip(came, moved, strict=True))))
    cache.blocks.save(OffloadBlocks(moved, (label(2), label(3))))
    cache.storage.stages.run()
    cache.check(*wanted)


@pytest.mark.parametrize("is_in_host_memory", [True, False])
@pytest.mark.parametrize("change", [Cache.overwrite, drop, shrink, move_another_row_there])
def test_blocks_of_a_row_are_saved_as_they_were(
    change: Callable[[Cache], None], is_in_host_memory: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first is there already; the last is filled in part, and in another segment."""
    monkeypatch.setattr(plane_spans, "is_in_host_memory", lambda: is_in_host_memory)
    cache = Cache()
    wanted = [cache.tokens(2, 4, 8), cache.tokens(2, 8, 12), cache.tokens(2, 12, 15)]
    places = (Place(0, 2), Place(0, 0), Place(1, 1))
    for segment_id in range(2):
        cache.blocks.save(CreateSegment(segment_id, 3))
    cache.blocks.save(SaveBlocks(0, 2, 1, 15, places))
    change(cache)
    cache.blocks.save(OffloadBlocks(places, (label(0), label(1), label(2, 3))))
    cache.storage.stages.run()
    cache.check(*wanted)


def test_whatever_has_a_shape_has_an_end() -> None:
    arrays = [mx.array(3), mx.zeros((2, 3)), mx.zeros((0, 4))]
    mx.eval(ends_of(arrays))
    assert [end.size for end in ends_of(arrays)] == [0, 0, 0]


def test_who_waits_for_ends_waits_for_nothing_that_is_written_later() -> None:
    state = mx.zeros((4, 1 << 20))
    ends = ends_of([state])
    state[1:3] = mx.random.normal((2, 1 << 20))
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    mx.eval(ends)
    assert mx.get_peak_memory() - before < 20 << 20, "the zeros alone"
    assert not mx.array_equal(state[1], state[0]).item()
