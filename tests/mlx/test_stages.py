"""Between two forwards arrays are read as they were when that was ordered, and then written in
place."""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx
import pytest

from mlx_lm_server.core.block import Place
from mlx_lm_server.core.plan import (
    CopyTokens,
    CreateSegment,
    CreateSlab,
    DropSlab,
    LoadBlocks,
    LoadState,
    MoveBlocks,
    MoveRow,
    OffloadBlocks,
    OffloadTokens,
    ResizeSlab,
    RestoreBlocks,
    SaveBlocks,
    SaveState,
)
from mlx_lm_server.core.tier import Label
from mlx_lm_server.runner.state.block_store import BlockStore
from mlx_lm_server.runner.state.kv_quantisation import Quantisation
from mlx_lm_server.runner.state.kv_storage import KVStorage, LayerShape
from mlx_lm_server.runner.state.record_bytes import read_array
from mlx_lm_server.runner.state.stages import ends_of
from mlx_lm_server.tier import Record
from tests.back_ends import BACKEND, with_policy

from .kept_records import KeptRecords

pytestmark = pytest.mark.each_way

BLOCK, SLOTS = 4, 3


class Cache:
    """A slab of random K and V of two layers, and what was offloaded."""

    def __init__(
        self,
        capacity: int = 18,
        dim: int = 8,
        quantisation: Quantisation | None = None,
        *,
        is_in_host_memory: bool = BACKEND.policy.is_in_host_memory,
    ) -> None:
        backend = with_policy(is_in_host_memory=is_in_host_memory)
        layers = [LayerShape(2, dim, dim, quantisation=quantisation)] * 2
        self.storage = KVStorage(layers, backend)
        self.blocks = BlockStore(self.storage, None, BLOCK)
        self.blocks.tier = self.kept = KeptRecords()
        self.storage.apply(CreateSlab(0, SLOTS, capacity))
        self.storage.stages.run()
        for planes in self.storage.slabs[0].planes:
            planes[:] = [
                mx.random.randint(0, 1 << 20, plane.shape).astype(plane.dtype) for plane in planes
            ]
        mx.eval(self.planes)

    @property
    def records(self) -> list[Record]:
        return self.kept.all

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


@pytest.mark.parametrize("number", [0, 5], ids=["the first of its slot", "another"])
def test_an_offloaded_block_takes_little_and_lets_the_slab_be_written_in_place(number: int) -> None:
    cache = Cache(capacity=4096, dim=64)
    held = cache.storage.nbytes
    cache.blocks.save(OffloadTokens(0, (1,), (number,), (label(0),)))
    move_another_row_there(cache)
    cache.overwrite()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    cache.storage.stages.run()
    mx.eval(cache.planes)
    assert mx.get_peak_memory() - before < held / 16


def test_only_a_few_blocks_to_copy_are_short() -> None:
    cache = Cache(capacity=4096, dim=64, is_in_host_memory=True)
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
    stages.run()
    cache.storage.apply(CreateSlab(1, 1, 64))
    assert not stages.are_short, "zeros, too"
    stages.run()
    cache.blocks.load(LoadBlocks(1, 0, 0, 4, (Place(0, 1),)))
    assert stages.are_short


@pytest.mark.parametrize("is_in_host_memory", [True, False])
def test_restored_blocks_are_moved_with_what_came_back(is_in_host_memory: bool) -> None:
    cache = Cache(is_in_host_memory=is_in_host_memory)
    wanted = [cache.tokens(2, 0, 4), cache.tokens(2, 12, 16)]
    cache.blocks.save(OffloadTokens(0, (2, 2), (0, 3), (label(0), label(1))))
    cache.storage.stages.run()
    names = tuple(record.name for record in cache.records)
    for segment_id in range(2):
        cache.blocks.save(CreateSegment(segment_id, 3))
    came, moved = (Place(0, 1), Place(0, 2)), (Place(1, 0), Place(0, 0))
    cache.blocks.save(RestoreBlocks(came, names))
    cache.blocks.save(MoveBlocks(tuple(zip(came, moved, strict=True))))
    cache.blocks.save(OffloadBlocks(moved, (label(2), label(3))))
    cache.storage.stages.run()
    cache.check(*wanted, *wanted)


@pytest.mark.parametrize("is_in_host_memory", [True, False])
@pytest.mark.parametrize("change", [Cache.overwrite, drop, shrink, move_another_row_there])
def test_blocks_of_a_row_are_saved_as_they_were(
    change: Callable[[Cache], None], is_in_host_memory: bool
) -> None:
    """The first is there already; the last is filled in part, and in another segment."""
    cache = Cache(is_in_host_memory=is_in_host_memory)
    wanted = [cache.tokens(2, 4, 8), cache.tokens(2, 8, 12), cache.tokens(2, 12, 15)]
    places = (Place(0, 2), Place(0, 0), Place(1, 1))
    for segment_id in range(2):
        cache.blocks.save(CreateSegment(segment_id, 3))
    cache.blocks.save(SaveBlocks(0, 2, 1, 15, places))
    change(cache)
    cache.blocks.save(OffloadBlocks(places, (label(0), label(1), label(2, 3))))
    cache.storage.stages.run()
    cache.check(*wanted)


@pytest.mark.parametrize("is_in_host_memory", [True, False])
@pytest.mark.parametrize("quantisation", [None, Quantisation(8, 8)])
@pytest.mark.parametrize(
    ("capacity", "start", "stop"),
    [(18, 0, 11), (16, 0, 12), (16, 0, 11), (16, 4, 12), (16, 5, 11), (18, 3, 4), (16, 7, 8)],
)
def test_blocks_come_back_to_another_row(
    capacity: int, start: int, stop: int, quantisation: Quantisation | None, is_in_host_memory: bool
) -> None:
    """Into a slab that the same plan makes, and into one that is there; nothing else changes."""
    cache = Cache(quantisation=quantisation, is_in_host_memory=is_in_host_memory)
    places = (Place(0, 1), Place(1, 0), Place(1, 2))
    for segment_id in range(2):
        cache.blocks.save(CreateSegment(segment_id, 3))
    cache.blocks.save(SaveBlocks(0, 1, 0, 11 if stop < 12 else 12, places))
    wanted = [plane[1, :, start:stop] + 0 for plane in cache.planes]
    others = [plane[0] + 0 for plane in cache.planes]
    mx.eval(wanted, others)
    first, last = start // BLOCK, -(-stop // BLOCK)
    cache.storage.apply(CreateSlab(1, 1, capacity))
    for slab_id, slot in ((1, 0), (0, 2)):
        cache.blocks.load(LoadBlocks(slab_id, slot, start, stop, places[first:last]))
    cache.storage.stages.run()
    for slab_id, slot in ((1, 0), (0, 2)):
        planes = [plane for planes in cache.storage.slabs[slab_id].planes for plane in planes]
        for plane, tokens in zip(planes, wanted, strict=True):
            assert mx.array_equal(plane[slot, :, start:stop], tokens).item()
    for plane, other in zip(cache.planes, others, strict=True):
        assert mx.array_equal(plane[0], other).item()


def test_blocks_are_loaded_for_all_tokens_or_not_at_all() -> None:
    cache = Cache(is_in_host_memory=True)
    cache.blocks.save(CreateSegment(0, 3))
    for num_blocks in (1, 3):
        places = tuple(Place(0, number) for number in range(num_blocks))
        with pytest.raises(ValueError, match="for tokens 1 to 8"):
            cache.blocks.load(LoadBlocks(0, 1, 1, 8, places))


@pytest.mark.parametrize("is_in_host_memory", [True, False])
def test_tokens_are_copied_between_slots(is_in_host_memory: bool) -> None:
    cache = Cache(is_in_host_memory=is_in_host_memory)
    wanted = cache.tokens(2, 3, 14)
    cache.storage.apply(CreateSlab(1, 1, 40))
    cache.blocks.load(CopyTokens(0, 2, 1, 0, 3, 14))
    cache.blocks.load(CopyTokens(1, 0, 0, 0, 3, 14))
    cache.overwrite()
    cache.storage.stages.run()
    planes = [plane for planes in cache.storage.slabs[1].planes for plane in planes]
    assert mx.array_equal(mx.stack([plane[0, :, 3:14] for plane in planes]), wanted).item()


@pytest.mark.parametrize("is_in_host_memory", [True, False])
@pytest.mark.parametrize(
    ("num_slots", "from_slab", "from_slot", "window", "dim"),
    [(1, 0, 0, 24, 64), (2, 1, 1, 24, 16), (2, 1, 1, 56, 64)],
    ids=["the only slot", "a tiny ring", "a ring"],
)
def test_a_checkpoint_stays_as_it_is_when_another_row_moves_in(
    num_slots: int, from_slab: int, from_slot: int, window: int, dim: int, is_in_host_memory: bool
) -> None:
    """MLX lets a small slice share the memory of what it was taken from."""
    backend = with_policy(is_in_host_memory=is_in_host_memory)
    storage = KVStorage([LayerShape(2, dim, dim, window=window)], backend)
    blocks = BlockStore(storage, None, BLOCK)
    for slab_id, slots, capacity in ((0, 2, 64), (1, num_slots, 128)):
        storage.apply(CreateSlab(slab_id, slots, capacity))
        (planes,) = storage.slabs[slab_id].planes
        planes[:] = [mx.random.normal(plane.shape) for plane in planes]
        mx.eval(planes)
    blocks.save(SaveState(0, 0, 1, 0, 100))
    wanted = [plane[0] + 0 for plane in storage.slabs[1].planes[0]]
    mx.eval(wanted)
    storage.apply(MoveRow(from_slab, from_slot, 1, 0, 60))
    storage.stages.run()
    storage.apply(CreateSlab(2, 1, 128))
    blocks.load(LoadState(0, 0, 2, 0, 100))
    storage.stages.run()
    for plane, ring in zip(storage.slabs[2].planes[0], wanted, strict=True):
        assert mx.array_equal(plane[0], ring).item()


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
