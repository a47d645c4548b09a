"""Which rows of a batch should lie together, so that attention takes few calls and pads little."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import groupby
from typing import NamedTuple


class Together(NamedTuple):
    """Rows that share a slab of this capacity."""

    capacity: int
    rows: tuple[int, ...]


class Bounds(NamedTuple):
    """Asks for as few groups as hold `comfortable_bytes`, at most `max_groups`; and for more only
    where those would hold over `max_bytes`."""

    max_groups: int
    comfortable_bytes: int
    max_bytes: int


def together(
    wanted: Mapping[int, int], bytes_of: Callable[[int], int], bounds: Bounds
) -> list[Together]:
    """Returns groups of rows within bounds. `wanted` says what capacity each row needs, `bytes_of`
    what a slot of some capacity takes.

    Sorted by length, groups are stretches; the best cut into k of them follows from the best ones
    into k - 1 (dynamic programming).
    """
    by_length = sorted(wanted, key=wanted.__getitem__)
    alike = [(n, tuple(rows)) for n, rows in groupby(by_length, key=wanted.__getitem__)]
    slot_bytes = [bytes_of(capacity) for capacity, _ in alike]
    counts = [0]
    for _, rows in alike:
        counts.append(counts[-1] + len(rows))
    held = [0.0] + [float("inf")] * len(alike)  # of the first lengths, in the best cut
    cuts: list[list[int]] = []
    while len(cuts) < len(alike):
        is_bounded = len(cuts) >= bounds.max_groups
        if held[-1] <= (bounds.max_bytes if is_bounded else bounds.comfortable_bytes):
            break
        starts, best = [0], [0.0]
        for end in range(1, len(held)):
            size = slot_bytes[end - 1]
            costs = [held[i] + (counts[end] - counts[i]) * size for i in range(end)]
            starts.append(min(range(end), key=costs.__getitem__))
            best.append(costs[starts[-1]])
        held = best
        cuts.append(starts)
    return _cut(alike, cuts)


def _cut(alike: list[tuple[int, tuple[int, ...]]], cuts: list[list[int]]) -> list[Together]:
    groups, end = [], len(alike)
    for starts in reversed(cuts):
        if end == 0:
            break
        start = starts[end]
        rows = tuple(row for _, some in alike[start:end] for row in some)
        groups.append(Together(alike[end - 1][0], rows))
        end = start
    return groups[::-1]
