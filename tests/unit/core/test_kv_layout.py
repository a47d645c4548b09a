from __future__ import annotations

import pytest
from scheduler_sim import SlabStore

from mlx_lm_server.core.kv_geometry import KVGeometry
from mlx_lm_server.core.kv_layout import KVLayout
from mlx_lm_server.core.plan import CreateSlab, DropSlab, KVOp, MoveRow, ResizeSlab
from mlx_lm_server.core.slab_rules import SlabRules
from mlx_lm_server.core.slabs import Location


def _layout(
    limit: int = 100_000, max_slab: int = 4096, max_rows: int = 32, *, keeps_holes: bool = False
) -> KVLayout:
    return KVLayout(KVGeometry(1), limit, SlabRules(max_slab, keeps_holes=keeps_holes), max_rows)


def _place(layout: KVLayout, row: int, num_tokens: int, held: int | None = None) -> None:
    layout.place(row, num_tokens)
    layout.set_num_tokens(row, num_tokens if held is None else held)


def _place_one_by_one(layout: KVLayout, num_rows: int) -> list[KVOp]:
    """Rows of 100 tokens; all operations for them."""
    ops: list[KVOp] = []
    for row in range(num_rows):
        _place(layout, row, 100)
        ops += layout.settle()
    return ops


@pytest.mark.parametrize(
    ("num_tokens", "capacity"),
    [
        (1, 64),
        (64, 64),
        (65, 96),
        (500, 512),
        (4096, 4096),
        (4097, 4352),
        (8192, 8192),
        (8193, 8704),
        (100_000, 102_400),
    ],
)
def test_a_capacity_class_is_the_smallest_that_holds_the_tokens(num_tokens: int, capacity: int):
    assert SlabRules().capacity_for(num_tokens) == capacity


def test_above_4096_tokens_a_class_wastes_at_most_a_sixteenth():
    for num_tokens in range(4097, 140_000, 61):
        capacity = SlabRules().capacity_for(num_tokens)
        assert num_tokens <= capacity <= 1.0625 * num_tokens
        assert capacity % 128 == 0


def test_the_first_row_makes_a_slab_of_one_slot():
    layout = _layout()
    _place(layout, 0, 100)
    assert layout.settle() == (CreateSlab(0, 1, 128),)
    assert layout.location(0) == Location(0, 0)
    assert layout.used_bytes == 128


def test_rows_that_come_together_get_a_slab_in_one_operation():
    layout = _layout()
    for row in range(5):
        _place(layout, row, 100)
    assert layout.settle() == (CreateSlab(0, 5, 128),)


def test_a_full_slab_doubles_its_slots():
    assert _place_one_by_one(_layout(), 5) == [
        CreateSlab(0, 1, 128),
        ResizeSlab(0, 2),
        ResizeSlab(0, 4),
        ResizeSlab(0, 8),
    ]


def test_a_slab_never_has_more_slots_than_there_are_rows_to_come():
    layout = _layout(max_rows=5)
    _place_one_by_one(layout, 5)
    assert layout.used_bytes == 5 * 128


def test_over_its_bound_a_class_gets_another_slab():
    layout = _layout(max_slab=300)
    for row in range(5):
        _place(layout, row, 100)
    layout.settle()
    assert layout.num_slabs == 3
    assert [layout.location(row).slab_id for row in range(5)] == [0, 0, 1, 1, 2]


def test_beyond_what_may_be_copied_the_next_slab_is_twice_as_large():
    layout = KVLayout(KVGeometry(1), 100_000, SlabRules(10_000, 300))
    assert _place_one_by_one(layout, 9) == [
        CreateSlab(0, 1, 128),
        ResizeSlab(0, 2),
        CreateSlab(1, 4, 128),
        CreateSlab(2, 8, 128),
    ]


def test_a_row_over_the_bound_has_a_slab_of_its_own():
    layout = _layout(max_slab=300)
    _place(layout, 0, 1000)
    _place(layout, 1, 1000)
    assert layout.settle() == (CreateSlab(0, 1, 1024), CreateSlab(1, 1, 1024))


def test_a_free_slot_in_a_slightly_larger_class_is_used():
    layout = _layout()
    for row in range(3):
        _place(layout, row, 190)
        layout.settle()
    layout.place(3, 128)
    assert layout.settle() == ()
    assert layout.capacity(3) == 192
    layout.place(4, 64)
    layout.settle()
    assert layout.capacity(4) == 64


def test_a_row_that_takes_the_slot_of_one_that_leaves_costs_nothing():
    layout = _layout()
    for row in range(4):
        _place(layout, row, 100)
    layout.settle()
    layout.release(1)
    layout.place(7, 100)
    assert layout.settle() == ()
    assert layout.location(7) == Location(0, 1)


def test_a_row_that_leaves_makes_only_the_last_one_move():
    layout = _layout()
    for row in range(4):
        _place(layout, row, 100 + row)
    layout.settle()
    layout.release(1)
    assert layout.settle() == (MoveRow(0, 3, 0, 1, 103),)


def test_a_row_without_tokens_is_not_copied():
    layout = _layout()
    for row in range(4):
        _place(layout, row, 100, held=0)
    layout.settle()
    layout.release(1)
    assert layout.settle() == ()
    assert layout.location(3) == Location(0, 1)


def test_a_slab_is_halved_at_a_quarter_of_its_use_and_dropped_when_empty():
    layout = _layout(limit=1100)
    for row in range(8):
        _place(layout, row, 100)
    layout.settle()
    for row in range(7, 1, -1):
        layout.release(row)
    assert layout.settle() == (ResizeSlab(0, 4),)
    layout.release(0)
    layout.release(1)
    assert layout.settle() == (DropSlab(0),)
    assert layout.used_bytes == layout.live_tokens == layout.num_slabs == 0


def test_where_memory_is_ample_a_slab_keeps_its_slots():
    layout = _layout(limit=8 * 1024)
    for row in range(8):
        _place(layout, row, 100)
    layout.settle()
    for row in range(7, 0, -1):
        layout.release(row)
        assert layout.settle() == ()
    assert layout.used_bytes == 8 * 128


def test_the_cache_leaves_rows_some_memory():
    layout = _layout(limit=8000)
    assert (layout.spare_bytes, layout.spare_bytes_to_cache) == (8000, 7000)
    _place(layout, 0, 500)
    layout.settle()
    assert (layout.spare_bytes, layout.spare_bytes_to_cache) == (7488, 7000)
    _place(layout, 1, 1000)
    layout.settle()
    assert layout.spare_bytes == layout.spare_bytes_to_cache == 8000 - 512 - 1024


def test_where_holes_may_stay_nobody_moves_and_newcomers_fill_them():
    layout = _layout(keeps_holes=True)
    for row in range(6):
        _place(layout, row, 100)
    layout.settle()
    layout.release(1)
    layout.release(3)
    assert layout.settle() == ()
    assert [layout.location(row).slot for row in (0, 2, 4, 5)] == [0, 2, 4, 5]
    _place(layout, 6, 100)
    assert layout.settle() == ()
    assert layout.location(6).slot == 1


def test_holes_are_filled_where_their_slots_are_wanted():
    layout = _layout(limit=8 * 128, keeps_holes=True)
    for row in range(8):
        _place(layout, row, 100)
    layout.settle()
    for row in (0, 1, 2, 4):
        layout.release(row)
    assert layout.settle() == ()
    _place(layout, 8, 200)
    moves = (MoveRow(0, 6, 0, 0, 100), MoveRow(0, 7, 0, 1, 100))
    assert layout.settle() == (CreateSlab(1, 1, 256), *moves, ResizeSlab(0, 6))


def test_a_row_grows_into_the_next_class_and_copies_only_itself():
    layout = _layout()
    _place(layout, 0, 128, held=60)
    layout.settle()
    assert layout.can_grow(0, 129)
    layout.grow(0, 129)
    assert layout.settle() == (CreateSlab(1, 1, 192), MoveRow(0, 0, 1, 0, 60), DropSlab(0))


def test_rows_that_grow_one_after_the_other_find_slots_beside_the_first():
    layout = _layout()
    for row in range(4):
        _place(layout, row, 128)
    layout.settle()
    layout.grow(3, 129)
    assert layout.settle() == (CreateSlab(1, 4, 192), MoveRow(0, 3, 1, 0, 128))
    for row, slot in ((2, 1), (1, 2)):
        layout.grow(row, 129)
        assert layout.settle() == (MoveRow(0, row, 1, slot, 128),), "neither slab is copied"
    layout.grow(0, 129)
    assert layout.settle() == (MoveRow(0, 0, 1, 3, 128), DropSlab(0))


def test_slots_for_rows_that_never_follow_are_given_back():
    layout = _layout(limit=2700)
    for row in range(8):
        _place(layout, row, 128)
    layout.settle()
    layout.grow(7, 129)
    layout.settle()
    for row in range(7):
        layout.release(row)
    assert layout.settle() == (DropSlab(0),)
    assert layout.used_bytes == 8 * 192
    layout.cached_bytes = 900
    _place(layout, 8, 130)
    layout.settle()
    layout.release(8)
    assert layout.settle() == (ResizeSlab(1, 2),)


def test_all_rows_of_a_slab_growing_at_once_are_copied_once_each():
    layout = _layout()
    for row in range(8):
        _place(layout, row, 128)
    layout.settle()
    for row in range(8):
        layout.grow(row, 129)
    ops = layout.settle()
    assert ops[0] == CreateSlab(1, 8, 192)
    assert [type(op) for op in ops[1:-1]] == [MoveRow] * 8
    assert ops[-1] == DropSlab(0)


def test_rows_that_change_places_between_slabs_are_read_before_they_are_overwritten():
    layout, store = _layout(), SlabStore()
    for row, size in enumerate((100, 100, 100, 190, 190, 190)):
        _place(layout, row, size)
    store.apply(layout.settle())
    for row in range(6):
        place = layout.location(row)
        held = layout.capacity(row) - 28
        layout.set_num_tokens(row, held)
        store.slabs[place.slab_id][place.slot][:held] = [row] * held
    layout.release(3)
    layout.grow(0, 190)
    layout.grow(4, 256)
    layout.grow(1, 250)
    store.apply(layout.settle())
    for row, held in ((0, 100), (1, 100), (2, 100), (4, 164), (5, 164)):
        place = layout.location(row)
        assert store.slabs[place.slab_id][place.slot][:held] == [row] * held


def test_near_the_limit_spare_slots_are_given_back_before_a_row_is_refused():
    layout = _layout(limit=1000)
    for row in range(3):
        _place(layout, row, 128)
        layout.settle()
    assert layout.used_bytes == 4 * 128
    assert layout.can_place(500)
    _place(layout, 3, 500)
    assert layout.settle() == (ResizeSlab(0, 3), CreateSlab(1, 1, 512))
    assert layout.used_bytes == 3 * 128 + 512


def test_the_limit_counts_whole_capacities():
    layout = _layout(limit=500)
    _place(layout, 0, 250)
    assert layout.can_place(192)
    assert not layout.can_place(257)
    assert not layout.can_grow(0, 501)
    assert layout.can_grow(0, 500)


def test_the_last_class_ends_at_the_limit():
    layout = _layout(limit=5000)
    assert layout.max_tokens_that_fit == 5000
    _place(layout, 0, 4900)
    layout.settle()
    assert layout.capacity(0) == layout.used_bytes == 5000


@pytest.mark.parametrize("short", [70, 150, 350])
@pytest.mark.parametrize("come_one_by_one", [True, False])
def test_one_long_row_beside_fifteen_short_ones_holds_little_more_than_it_uses(
    short: int, come_one_by_one: bool
):
    layout = _layout(limit=10**6)
    _place(layout, 0, 8193 + 64, held=8193)
    for row in range(1, 16):
        _place(layout, row, short + 32, held=short)
        if come_one_by_one:
            layout.settle()
    layout.settle()
    assert layout.used_bytes <= 1.25 * layout.live_tokens
    assert layout.num_slabs <= 3


def test_a_row_number_is_placed_again_only_after_the_layout_has_settled():
    layout = _layout()
    _place(layout, 0, 100)
    layout.settle()
    layout.release(0)
    with pytest.raises(AssertionError):
        layout.place(0, 100)
    layout.settle()
    layout.place(0, 100)
