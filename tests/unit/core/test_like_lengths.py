"""Where attention calls are counted: few slabs, little padding, and few copies for it."""

from __future__ import annotations

import pytest
from benchmarks.shape_slabs import LIMITS, TOKEN_BYTES, log_uniform, lying

from mlx_lm_server.core.kv_geometry import KVGeometry
from mlx_lm_server.core.kv_layout import KVLayout
from mlx_lm_server.core.like_lengths import Bounds, together
from mlx_lm_server.core.scheduler_limits import SchedulerLimits
from mlx_lm_server.core.slab_rules import MAX_HELD_RATIO, SlabRules


def _layout(capacity_step: int = 32, limit_bytes: int = 80 << 30) -> KVLayout:
    rules = SlabRules(limit_bytes // 8, None, capacity_step=capacity_step, max_slabs=6)
    return KVLayout(KVGeometry(TOKEN_BYTES), limit_bytes, rules)


def _place(layout: KVLayout, row: int, num_tokens: int) -> None:
    layout.place(row, num_tokens + LIMITS.lookahead(num_tokens))
    layout.settle()
    layout.set_num_tokens(row, num_tokens)


@pytest.mark.parametrize("capacity_step", [32, 256])
@pytest.mark.parametrize("seed", range(40))
def test_rows_of_any_length_lie_in_six_slabs_and_half_again_their_tokens(
    seed: int, capacity_step: int
):
    rows = lying(log_uniform(seed), capacity_step)
    assert rows.num_slabs <= 6
    assert rows.held <= 1.5
    assert rows.copied <= 7


@pytest.mark.parametrize("length", [20, 50, 100, 500])
def test_short_rows_with_long_answers_hold_four_times_their_tokens(length: int):
    for rules in (
        SlabRules(8 << 30, 64 << 20),
        SlabRules(8 << 30, None, capacity_step=32, max_slabs=6),
    ):
        share = 1.0 if rules.max_slabs is None else 1 / 8
        limits = SchedulerLimits(lookahead_tokens=1024, lookahead_share=share)
        layout = KVLayout(KVGeometry(TOKEN_BYTES), 64 << 30, rules)
        for row in range(32):
            layout.place(row, length + min(2048, limits.lookahead(length)))
            layout.settle()
            layout.set_num_tokens(row, length)
        assert layout.used_bytes <= 4 * 32 * length * TOKEN_BYTES


def test_rows_that_grow_stay_in_six_slabs():
    lengths, layout = log_uniform(3), _layout()
    for row, length in enumerate(lengths):
        _place(layout, row, length)
    for step in range(400):
        for row, length in enumerate(lengths):
            needed = length + step + 1
            if needed > layout.capacity(row):
                layout.grow(row, needed + LIMITS.lookahead(needed))
            layout.set_num_tokens(row, needed)
        layout.settle()
        assert layout.num_slabs <= 6
    assert layout.used_bytes <= 1.5 * (sum(lengths) + 400 * 32) * TOKEN_BYTES


def test_rows_of_one_length_grow_in_one_step():
    layout = _layout()
    for row in range(32):
        _place(layout, row, 1000)
        layout.set_num_tokens(row, 1100)
    layout.grow(5, layout.capacity(5) + 100)
    layout.settle()
    assert layout.num_slabs == 1


def test_where_memory_is_short_there_are_more_slabs():
    lengths = [1000 * n for n in range(1, 11)]
    needed = sum(SlabRules(capacity_step=32).capacity_for(n) for n in lengths)
    layout = _layout(limit_bytes=int(1.01 * needed) * TOKEN_BYTES)
    for row, length in enumerate(lengths):
        layout.place(row, length)
        layout.settle()
        layout.set_num_tokens(row, length)
    assert layout.num_slabs > 6
    assert layout.used_bytes <= layout.limit_bytes


def test_the_best_cut_is_the_one_that_trying_all_finds():
    wanted = dict(enumerate([64, 64, 96, 128, 512, 640, 640, 4096]))
    for max_groups in (1, 2, 3, 8):
        bounds = Bounds(max_groups, int(MAX_HELD_RATIO * sum(wanted.values())), 1 << 40)
        groups = together(wanted, lambda capacity: capacity, bounds)
        assert sorted(row for group in groups for row in group.rows) == list(range(8))
        assert len(groups) <= max_groups
        held = sum(group.capacity * len(group.rows) for group in groups)
        best = _least_held(sorted(wanted.values()), len(groups))
        assert held == best
        if len(groups) < max_groups:
            assert held <= MAX_HELD_RATIO * sum(wanted.values())


def _least_held(lengths: list[int], num_groups: int) -> int:
    if num_groups == 1:
        return lengths[-1] * len(lengths)
    return min(
        _least_held(lengths[:cut], num_groups - 1) + lengths[-1] * (len(lengths) - cut)
        for cut in range(num_groups - 1, len(lengths))
    )


def test_with_cudas_kernels_capacities_are_whole_steps():
    layout = _layout(capacity_step=256)
    for row, length in enumerate(log_uniform(1)):
        _place(layout, row, length)
    capacities = [layout._slab_of[row].capacity for row in range(32)]
    assert all(capacity % 256 == 0 for capacity in capacities if capacity > 256)
