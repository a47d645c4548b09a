"""Recurrent and convolution state of all rows: per array one `[rows, …]`, the rows in the order of
the last forward, so that decoding the same rows again copies nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx

from mlx_lm_server.runner.state.cache_kinds import RecurrentState


class RowStates:
    """Owned by the forward that uses it, on the engine's main thread. Holds live rows only."""

    def __init__(self, parts: Sequence[RecurrentState]) -> None:
        self._parts = parts
        self._rows: list[int] = []
        self._arrays: list[list[mx.array | None]] = [[None] * len(p.arrays) for p in parts]

    @property
    def parts(self) -> Sequence[RecurrentState]:
        return self._parts

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in self.arrays)

    @property
    def arrays(self) -> list[mx.array]:
        return [array for part in self._arrays for array in part if array is not None]

    def fresh(self) -> list[Any]:
        """mlx-lm's caches of a row that has seen nothing."""
        from mlx_lm.models.cache import ArraysCache

        return [ArraysCache(len(part.arrays)) for part in self._parts]

    def take(self, rows: Sequence[int]) -> list[Any]:
        """mlx-lm's caches filled with the state of these rows, in their order."""
        caches = self.fresh()
        is_as_kept = not self._parts or list(rows) == self._rows
        places = None if is_as_kept else self._places(rows)
        for cache, arrays in zip(caches, self._arrays, strict=True):
            cache.cache = [a if a is None or places is None else a[places] for a in arrays]
        return caches

    def put(self, rows: Sequence[int], caches: Sequence[Any]) -> None:
        """Keep what a forward of these rows left in their caches."""
        new = [list(cache.cache) for cache in caches]
        others = [row for row in self._rows if row not in set(rows)]
        if not others:
            self._arrays, self._rows = new, list(rows)
        elif set(rows) <= set(self._rows):
            self._overwrite(self._places(rows), new)
        else:
            self._join(new, self._places(others))
            self._rows = [*rows, *others]

    def read(self, row: int) -> list[list[mx.array | None]]:
        """A copy of the state of one row, `[1, …]` each."""
        if not self._parts:
            return []
        place = self._rows.index(row)
        return [
            [None if a is None else mx.contiguous(a[place : place + 1]) for a in part]
            for part in self._arrays
        ]

    def write(self, row: int, state: Sequence[Sequence[mx.array | None]]) -> None:
        """Let the row go on from a state that `read` gave."""
        if not self._parts:
            return
        caches = self.fresh()
        for cache, part in zip(caches, state, strict=True):
            cache.cache = list(part)
        self.put([row], caches)

    def drop(self, rows: Sequence[int]) -> None:
        staying = [row for row in self._rows if row not in set(rows)]
        if len(staying) == len(self._rows):
            return
        places = self._places(staying)
        self._arrays = [
            [a[places] if a is not None and staying else None for a in part]
            for part in self._arrays
        ]
        self._rows = staying

    def _places(self, rows: Sequence[int]) -> mx.array:
        return mx.array([self._rows.index(row) for row in rows], mx.int32)

    def _overwrite(self, places: mx.array, new: list[list[mx.array | None]]) -> None:
        for kept, part in zip(self._arrays, new, strict=True):
            for number, array in enumerate(part):
                target = kept[number]
                if array is not None and target is not None:
                    target[places] = array

    def _join(self, new: list[list[mx.array | None]], others: mx.array) -> None:
        joined: list[list[mx.array | None]] = []
        for kept, part in zip(self._arrays, new, strict=True):
            joined.append([])
            for old, array in zip(kept, part, strict=True):
                both = None
                if array is not None and old is not None:
                    both = mx.concatenate([array, old[others]])
                joined[-1].append(both)
        self._arrays = joined
