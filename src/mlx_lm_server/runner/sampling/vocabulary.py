"""Reductions over the vocabulary, and the few tokens that matter of it, without a sort of all.

MLX's CPU back end reduces the last axis element by element (1.2 ns each) and an axis before it by
vectors (0.2), so there the vocabulary is looked at as `[depth, width]` and reduced over its depth
first.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from math import ceil, sqrt

import mlx.core as mx

from mlx_lm_server.runner.bounded_compile import BoundedCompile

# Parts of the vocabulary that are added up at once, so that what is summed is never written whole.
MAX_SLICES = 8
# Longer rows are sorted in blocks and merged, which takes three kernels more on Metal, and then two
# for each doubling (MLX 0.32).
SORTED_AT_ONCE = 2048


class Vocabulary:
    """Reductions over `[n, vocab]`, each to `[n, 1]` where nothing else is said; the largest is
    looked for in up to `max_depth` parts."""

    def __init__(self, size: int, max_depth: int) -> None:
        self.size = size
        self._depth = _largest_divisor(size, max_depth)
        self._width = size // self._depth
        self._num_slices = _largest_divisor(size, MAX_SLICES)
        self._add_up = BoundedCompile(_added_up)

    def largest(self, values: mx.array) -> mx.array:
        if self._depth > 1:
            values = self._stacked(values).max(axis=-2)
        return values.max(axis=-1, keepdims=True)

    def masses_above(self, weights: mx.array, bars: mx.array) -> mx.array:
        """Returns the sums `[n, m]` of those weights that are larger than each of the row's bars
        `[n, m]`."""
        width = self.size // self._num_slices
        rows = weights[:, None]
        slices = [rows[:, :, i * width : (i + 1) * width] for i in range(self._num_slices)]
        return self._add_up(bars[:, :, None], *slices).sum(axis=-1)

    def place_of_largest(self, values: mx.array) -> mx.array:
        """Returns one of the places, where several hold the largest value."""
        if self._depth == 1:
            return mx.argmax(values, axis=-1, keepdims=True)
        stacked = self._stacked(values)
        column = mx.argmax(stacked.max(axis=-2), axis=-1, keepdims=True)
        inside = mx.take_along_axis(stacked, column[..., None, :], axis=-1)  # [n, depth, 1]
        return mx.argmax(inside, axis=-2) * self._width + column

    def _stacked(self, values: mx.array) -> mx.array:
        return values.reshape(*values.shape[:-1], self._depth, self._width)


def _largest_divisor(size: int, most: int) -> int:
    return next(divisor for divisor in range(most, 0, -1) if size % divisor == 0)


def _added_up(bars: mx.array, *slices: mx.array) -> mx.array:
    """Returns, place by place of a slice, the sums of what is above the bars."""
    sums = [weights * (weights > bars) for weights in slices]
    while len(sums) > 1:
        pairs = [left + right for left, right in zip(sums[::2], sums[1::2], strict=False)]
        sums = pairs + sums[2 * len(pairs) :]
    return sums[0]


def among_the_largest(keys: mx.array, num: int, *arrays: mx.array) -> list[mx.array]:
    """Keys and arrays `[n, size]` → of each array what stands at the same few places, among which
    are those of the `num` largest keys.

    Tokens are looked at in groups: the largest keys lie in the groups with the largest peaks. All
    places are given where that would not halve them.
    """
    size = keys.shape[-1]
    depth = _depth_of_groups(size, num)
    num_groups = size // depth
    if num_groups + num * depth > size // 2:
        return list(arrays)
    grouped = depth * num_groups

    def in_groups(values: mx.array) -> mx.array:
        whole = values if grouped == size else values[:, :grouped]
        return whole.reshape(-1, depth, num_groups)

    peaks = in_groups(keys).max(axis=1)
    leading = mx.argpartition(peaks, num_groups - num, axis=-1)[:, None, num_groups - num :]
    found = [mx.take_along_axis(in_groups(values), leading, axis=2) for values in arrays]
    few = [values.reshape(-1, depth * num) for values in found]
    if grouped == size:
        return few
    pairs = zip(few, arrays, strict=True)
    return [mx.concatenate([part, values[:, grouped:]], axis=1) for part, values in pairs]


def floors(values: mx.array, ks: Sequence[int]) -> mx.array:
    """Values `[n, size]` → `[n, 1]`: each row's k-th largest, and some value where k is 0."""
    deepest = max(ks)
    [few] = among_the_largest(values, deepest, values)
    if few is values:
        few = mx.topk(values, deepest, axis=-1)
    leaders = mx.sort(few, axis=-1)  # ascending
    places = mx.array([[leaders.shape[-1] - (k or deepest)] for k in ks])
    return mx.take_along_axis(leaders, places, axis=-1)


@cache
def _depth_of_groups(size: int, num: int) -> int:
    """Returns how many tokens a group has: about so many that groups and what is in `num` of them
    are fewest. Before that, both should be sorted at once, and no token be left over."""
    ideal = sqrt(size / num)

    def costs(depth: int) -> tuple[int, bool, int]:
        lengths = size // depth, num * depth + size % depth
        return sum(length > SORTED_AT_ONCE for length in lengths), size % depth > 0, sum(lengths)

    return min(range(max(1, ceil(ideal / 2)), max(1, ceil(2 * ideal)) + 1), key=costs)
