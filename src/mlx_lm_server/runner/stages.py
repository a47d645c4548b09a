"""Operations on slabs and pool, to be run one after the other between two forwards.

MLX decides when an operation is submitted whether it may write in place, and an operation under
way still holds what it reads. So what is read from an array must have ended before the array is
written; else the write copies all of it (docs/adr/0002). The graph of a forward is built before the
last one has ended, and so are these operations; each stage is waited for before the next begins,
and all of them before that forward is submitted.
"""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx


class Stages:
    """Used on the engine's main thread only."""

    def __init__(self) -> None:
        self._stages: list[list[mx.array]] = []

    def add(self, written: Sequence[mx.array]) -> None:
        """The operations that gave these arrays make a stage. Nothing of the arrays themselves is
        held: an empty slice depends on them all the same."""
        if written:
            self._stages.append([array[:0] for array in written])

    def run(self) -> None:
        for stage in self._stages:
            mx.eval(stage)
            stage.clear()
        self._stages.clear()
