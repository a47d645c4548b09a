"""While rows grow and are brought together, memory stays near what is held before or after."""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx
import pytest

from mlx_lm_server.core.kv_layout import KVLayout
from mlx_lm_server.core.plan import CreateSlab, DropSlab, KVOp, MoveRow, ResizeSlab
from mlx_lm_server.core.slab_rules import SlabRules
from mlx_lm_server.runner.backends.fused_kernel import MAX_MASKS, FusedKernel, sees
from mlx_lm_server.runner.state.kv_storage import KVStorage, LayerShape
from tests.back_ends import with_policy

pytestmark = pytest.mark.each_way

LAYERS, KV_HEADS, DIM = 16, 2, 64
TOKEN_BYTES = LAYERS * 2 * KV_HEADS * DIM * 4


class Rows:
    """A layout, and slabs that follow it."""

    def __init__(self, max_slabs: int | None = 3) -> None:
        backend = with_policy(max_copied_bytes=1)  # one layer at a time
        self.storage = KVStorage([LayerShape(KV_HEADS, DIM, DIM)] * LAYERS, backend)
        rules = SlabRules(TOKEN_BYTES << 20, None, capacity_step=32, max_slabs=max_slabs)
        self.layout = KVLayout(self.storage.geometry, TOKEN_BYTES << 14, rules)
        self.num_rows = 0

    def place(self, num_tokens: int) -> None:
        row, self.num_rows = self.num_rows, self.num_rows + 1
        self.layout.place(row, num_tokens)
        self.layout.set_num_tokens(row, num_tokens)
        self.settle()
        where = self.layout.location(row)
        for planes in self.storage.slabs[where.slab_id].planes:
            for plane in planes:
                plane[where.slot, :, :num_tokens] = mx.array(row + 1, plane.dtype)
                mx.eval(plane)

    def settle(self) -> tuple[KVOp, ...]:
        ops = self.layout.settle()
        self.storage.apply(*ops)
        self.storage.stages.run()
        return ops

    def check(self) -> None:
        for row, where in self.layout.settled.items():
            num_tokens = self.layout._num_tokens[row]
            for planes in self.storage.slabs[where.slab_id].planes:
                for plane in planes:
                    assert (plane[where.slot, :, :num_tokens] == row + 1).all()


def _peak_beyond(rows: Rows, change: Callable[[], object]) -> int:
    """How much more than the larger of what is held before and after, in bytes."""
    before = rows.storage.nbytes
    mx.clear_cache()
    mx.reset_peak_memory()
    others = mx.get_active_memory() - before
    change()
    return mx.get_peak_memory() - others - max(before, rows.storage.nbytes)


def _one_layer(rows: Rows) -> int:
    return rows.storage.nbytes // LAYERS


def test_a_long_row_that_grows_takes_one_layer_more() -> None:
    rows = Rows()
    rows.place(1000)
    rows.layout.grow(0, 1200)
    assert _peak_beyond(rows, rows.settle) <= 1.1 * _one_layer(rows)
    rows.check()


def test_rows_of_one_length_grow_together_and_take_one_layer_more() -> None:
    rows = Rows()
    for _ in range(8):
        rows.place(512)
    rows.layout.grow(3, 576)
    assert {rows.layout.capacity(row) for row in range(8)} == {576}
    ops: list[KVOp] = []
    assert _peak_beyond(rows, lambda: ops.extend(rows.settle())) <= 1.1 * _one_layer(rows)
    assert len([op for op in ops if isinstance(op, MoveRow)]) == 8
    rows.check()


def test_rows_that_are_brought_together_take_one_layer_more() -> None:
    rows = Rows()
    for num_tokens in (300, 900):
        rows.place(num_tokens)
    rows.layout.place(2, 2000)
    rows.layout.set_num_tokens(2, 0)
    ops: list[KVOp] = []
    assert _peak_beyond(rows, lambda: ops.extend(rows.settle())) <= 1.1 * _one_layer(rows)
    assert rows.layout.num_slabs == 2
    assert any(isinstance(op, MoveRow) for op in ops)
    rows.check()


def test_a_slab_with_more_slots_takes_one_layer_more() -> None:
    rows = Rows(max_slabs=None)
    for _ in range(4):
        rows.place(512)
    rows.layout.place(4, 512)
    ops: list[KVOp] = []
    assert _peak_beyond(rows, lambda: ops.extend(rows.settle())) <= 1.1 * _one_layer(rows)
    assert [type(op) for op in ops] == [ResizeSlab]
    rows.check()


def test_a_change_of_many_rows_is_one_wait_for_some_layers() -> None:
    rows = Rows()
    ops = [CreateSlab(7, 8, 64), CreateSlab(8, 8, 128)]
    rows.storage.apply(*ops)
    rows.storage.stages.run()
    moves = [MoveRow(7, slot, 8, slot, 50) for slot in range(8)]
    waits = []
    stages = rows.storage.stages
    rows.storage.apply(*moves, DropSlab(7))
    while stages._stages:
        waits.append(stages._stages.popleft())
        mx.eval(waits[-1][0])
        if (then := waits[-1][1]) is not None:
            then()
    per_layer = 8 if rows.storage.is_in_host_memory else 1
    assert len(waits) == LAYERS * per_layer


def test_a_slab_that_is_read_and_then_written_is_written_in_place() -> None:
    """A row leaves it for a larger one, and another takes its slot."""
    storage = Rows().storage
    storage.apply(CreateSlab(7, 8, 64), CreateSlab(8, 8, 512), CreateSlab(9, 8, 1024))
    storage.stages.run()
    held = storage.nbytes
    mx.clear_cache()
    others = mx.get_active_memory() - held
    mx.reset_peak_memory()
    storage.apply(MoveRow(8, 0, 9, 0, 32), MoveRow(7, 0, 8, 0, 32))
    storage.stages.run()
    of_slab = storage.slab_bytes([8]) // LAYERS
    assert mx.get_peak_memory() - others - held < of_slab / 4


def test_layers_with_a_window_share_the_mask_of_a_chunk() -> None:
    kernel = FusedKernel(lambda stored: stored, multiplies_codes=False)  # type: ignore[arg-type]
    masks = [kernel._window_mask(start, 6, 4) for start in (3, 3, 5)]
    assert masks[0] is masks[1]
    assert mx.array_equal(masks[2], sees(5, 6, 0, 11, 4))
    for start in range(2 * MAX_MASKS):
        kernel._window_mask(start, 6, 4)
    assert len(kernel._masks) == MAX_MASKS
