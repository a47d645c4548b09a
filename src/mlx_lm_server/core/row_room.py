"""How much memory rows get, and when: some for the answer to come, more before it is needed, and
where memory is short, at the cost of what the prefix cache keeps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol

from mlx_lm_server.core.hit import Hit
from mlx_lm_server.core.kv_layout import KVLayout
from mlx_lm_server.core.prefix_cache import PrefixCache
from mlx_lm_server.core.request import Request


class Fits(Protocol):
    def __call__(self, *, tightly: bool) -> bool: ...


class RowRoom:
    """Owned by the scheduler. A row that is made gets room for some of its answer, or for all of a
    shorter one, and so does one that grows where memory allows it: as many tokens as `lookahead`
    gives for those that it has."""

    def __init__(
        self, layout: KVLayout, cache: PrefixCache, lookahead: Callable[[int], int]
    ) -> None:
        self._layout = layout
        self._cache = cache
        self._lookahead = lookahead

    def tokens_soon(self, request: Request) -> int:
        """How many tokens its row will hold before long."""
        num_tokens = request.num_known_tokens
        return num_tokens + self._tokens_ahead(request, num_tokens)

    def find_place(self, num_tokens: int, hit: Hit | None) -> bool:
        """Whether a row fits, with what it is to go on from still in the cache."""
        pinned = self._cache.pin(hit)
        has_place = self._find(partial(self._layout.can_place, num_tokens), could_fit=True)
        if not has_place:
            self._cache.unpin(pinned)
        return has_place

    def has_next(self, request: Request) -> bool:
        """Whether one more token of its row has a place at nobody's cost."""
        row, needed = request.held_row, request.num_computed_tokens + 1
        is_there = needed <= self._layout.capacity(row)
        return is_there or self._layout.can_grow(row, needed, tightly=True)

    def spare_tokens(self, request: Request) -> int:
        """Returns for how many tokens beyond the next one its row has places."""
        return self._layout.capacity(request.held_row) - request.num_computed_tokens - 1

    def find_next(self, request: Request) -> bool:
        """Have a place for one more token of its row; False where all that is not cached is taken
        by rows."""
        row, needed = request.held_row, request.num_computed_tokens + 1
        if needed <= self._layout.capacity(row):
            return True
        could_fit = self._layout.could_grow(row, needed)
        has_place = self._find(partial(self._layout.can_grow, row, needed), could_fit)
        if has_place:
            self._grow(request, needed)
        return has_place

    def grow_one_ahead(self, decoding: Sequence[Request]) -> None:
        """Rows of one length, which would all be copied in one step, are copied one a step before
        they have to; the last in its slab first, so that no neighbour takes its place."""
        near = []
        for request in decoding:
            num_spare = self.spare_tokens(request)
            if num_spare < len(decoding) and num_spare < request.num_tokens_to_plan - 1:
                near.append((num_spare, -self._layout.location(request.held_row).slot, request))
        if near:
            *_, request = min(near, key=lambda item: item[:2])
            needed = self._layout.capacity(request.held_row) + 1
            if self._layout.can_grow(request.held_row, needed):
                self._grow(request, needed)

    def _grow(self, request: Request, needed: int) -> None:
        num_tokens = request.num_computed_tokens + 1
        soon = num_tokens + self._tokens_ahead(request, num_tokens)
        is_ample = soon > needed and self._layout.can_grow(request.held_row, soon)
        self._layout.grow(request.held_row, soon if is_ample else needed)

    def _tokens_ahead(self, request: Request, num_tokens: int) -> int:
        return max(0, min(request.num_tokens_to_plan - 1, self._lookahead(num_tokens)))

    def _find(self, fits: Fits, could_fit: bool) -> bool:
        """Returns whether memory is there, if need be at the cost of what is cached; tightly where
        that gives no more."""
        while not fits(tightly=False):
            if not (could_fit and self._cache.give_back()):
                return fits(tightly=True)
        return True
