"""Tells how far prompts are, to those who ask."""

from __future__ import annotations

from collections.abc import Iterable

from mlx_lm_server.core.plan import RowWork, StepPlan
from mlx_lm_server.protocol import RequestOutput


class PrefillProgress:
    """Follows the plans as they are carried out. Owned by the EngineCore."""

    def __init__(self) -> None:
        self._watched: set[str] = set()
        self._rows: dict[int, str] = {}  # of watched requests that had no token when they joined
        self._num_own: dict[int, int] = {}  # tokens that these rows computed themselves

    def watch(self, req_id: str) -> None:
        self._watched.add(req_id)

    def forget(self, outputs: Iterable[RequestOutput]) -> None:
        """Requests that ended."""
        if self._watched:
            self._watched -= {o.req_id for o in outputs if o.finish_reason is not None}

    def after(self, plan: StepPlan) -> list[RequestOutput]:
        """What a plan that has been carried out means for the watched."""
        for row in plan.left_rows:
            self._rows.pop(row, None)
        for joined in plan.joined_rows:
            if joined.req_id in self._watched and not joined.output_ids:
                self._rows[joined.row] = joined.req_id
                self._num_own[joined.row] = 0
        watched = self._watched
        return [
            self._told(chunk)
            for chunk in plan.chunks
            if self._rows.get(chunk.row) in watched and not chunk.guesses
        ]

    def _told(self, chunk: RowWork) -> RequestOutput:
        self._num_own[chunk.row] += chunk.num_tokens
        return RequestOutput(
            self._rows[chunk.row],
            [],
            num_computed_tokens=chunk.end,
            num_reused_tokens=chunk.end - self._num_own[chunk.row],
        )
