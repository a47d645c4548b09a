"""Tells how far prompts are: to those who ask at each step, and of the others now and then, so that
the server sees that something happens."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from mlx_lm_server.core.plan import RowWork, StepPlan
from mlx_lm_server.protocol import RequestOutput

# Between two words about a prompt that nobody asks about.
QUIET_S = 1.0


class PrefillProgress:
    """Follows the plans as they are carried out. Owned by the EngineCore."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._watched: set[str] = set()
        self._rows: dict[int, str] = {}
        self._num_own: dict[int, int] = {}  # tokens that these rows computed themselves
        self._told_s = 0.0  # when quiet rows were spoken of last

    def watch(self, req_id: str) -> None:
        """Tells of each step of this request until its first token."""
        self._watched.add(req_id)

    def forget(self, outputs: Iterable[RequestOutput]) -> None:
        """Requests that ended."""
        if self._watched:
            self._watched -= {o.req_id for o in outputs if o.finish_reason is not None}

    def after(self, plan: StepPlan) -> list[RequestOutput]:
        """Returns what is told after a plan to those who wait for their first token."""
        for row in plan.left_rows:
            self._rows.pop(row, None)
        for joined in plan.joined_rows:
            self._rows[joined.row] = joined.req_id
            self._num_own[joined.row] = 0
            if joined.output_ids:  # it has told its first token
                self._watched.discard(joined.req_id)
        chunks = [chunk for chunk in plan.chunks if not chunk.guesses]
        if not chunks:
            return []
        for chunk in chunks:
            self._num_own[chunk.row] += chunk.num_tokens
        tells_all = self._clock() - self._told_s >= QUIET_S
        if tells_all:
            self._told_s = self._clock()
        return [self._told(chunk) for chunk in chunks if self._is_due(chunk, tells_all=tells_all)]

    def _is_due(self, chunk: RowWork, *, tells_all: bool) -> bool:
        """Returns whether it is told how far a row is, which a last chunk's own output says too."""
        return self._rows[chunk.row] in self._watched or (tells_all and not chunk.yields)

    def _told(self, chunk: RowWork) -> RequestOutput:
        return RequestOutput(
            self._rows[chunk.row],
            [],
            num_computed_tokens=chunk.end,
            num_reused_tokens=chunk.end - self._num_own[chunk.row],
        )
