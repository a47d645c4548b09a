"""How rows leave whose requests have ended: a few blocks in each step, so that nobody beside them
waits while a long one is copied to the pool.

Until it has left, a row keeps its number and its slot, and others may go on from what it holds.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from mlx_lm_server.core.kv_layout import KVLayout
from mlx_lm_server.core.prefix_cache import PrefixCache
from mlx_lm_server.core.request import Request, RequestStatus


@dataclass(slots=True)
class _Leaving:
    request: Request
    num_done: int = 0  # of its blocks, the first ones


class Departures:
    """Owned by the scheduler."""

    def __init__(self, cache: PrefixCache, layout: KVLayout) -> None:
        self._cache = cache
        self._layout = layout
        self._leaving: deque[_Leaving] = deque()

    def __len__(self) -> int:
        return len(self._leaving)

    def add(self, request: Request) -> None:
        """The request has ended, or all its tokens are planned; it is still in its row."""
        self._leaving.append(_Leaving(request))

    def would_place(self, num_tokens: int) -> bool:
        """Whether one of the rows has just the slot that a row of so many tokens needs."""
        return any(
            self._layout.suits(leaving.request.held_row, num_tokens) for leaving in self._leaving
        )

    def go_on(self, most_bytes: int | None) -> list[int]:
        """Saves the next part of what is to be saved, of so many bytes and at least a block, or all
        of it. Returns the rows that have left."""
        left = []
        num_blocks = 0 if most_bytes is None else self._cache.blocks_in(most_bytes)
        while self._leaving:
            first = self._leaving[0]
            if most_bytes is not None:
                kept = self._cache.keep_some(first.request, first.num_done, num_blocks)
                first.num_done, num_blocks = kept.stop, num_blocks - kept.num_saved
                if num_blocks == 0:
                    break
            left.append(self.leave(self._leaving.popleft().request))
        return left

    def leave(self, request: Request) -> int:
        """Save what is left and give the row back, in this step."""
        row = request.held_row
        self._cache.keep(request)
        self._layout.release(row)
        request.row = None
        if request.status is RequestStatus.FINISHED:
            self._cache.forget(request)
        return row
