"""Tells before each step whose it is, so that the server knows whom to suspect of a death."""

from __future__ import annotations

from mlx_lm_server.core.plan import StepPlan
from mlx_lm_server.step_note import StepNote


class ToldSteps:
    """Follows the plans as they are submitted. Owned by the EngineCore."""

    def __init__(self, note: StepNote | None = None) -> None:
        self._note = note
        self._ids: dict[int, str] = {}  # by row

    def before(self, plan: StepPlan) -> None:
        """Takes note of a plan that is about to be submitted."""
        if self._note is None:
            return
        ids = self._ids
        for joined in plan.joined_rows:
            ids[joined.row] = joined.req_id
        told = [ids[work.row] for work in plan.works]
        told += [row.req_id for row in plan.joined_rows if row.req_id not in told]
        self._note.tell(told)

    def none_left(self) -> None:
        """Takes note that nothing is under way any more."""
        if self._note is not None:
            self._note.clear()
