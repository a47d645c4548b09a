"""Ends the reasoning of a row whose budget is spent.

A function of the row's tokens alone, so it is the same whatever shares the batch, and after a
preemption. The tokens are those that the host has read: the engine reads each one before the next
is drawn.
"""

from __future__ import annotations

from collections.abc import Iterable

from mlx_lm_server.protocol import ThinkingBudget


class ThinkingClock:
    """Of one row. `forced` is the token that comes next, whatever the model would say."""

    __slots__ = ("_budget", "_forced", "_is_thinking", "_last", "_num_thought")

    def __init__(self, budget: ThinkingBudget, output_ids: Iterable[int] = ()) -> None:
        self._budget = budget
        self._is_thinking = budget.is_open
        self._num_thought = 0
        self._last: tuple[int, ...] = ()  # as many as begin the reasoning
        self._forced: tuple[int, ...] = ()
        self._force_if_spent()
        for token in output_ids:
            self.push(token)

    @property
    def forced(self) -> int | None:
        return self._forced[0] if self._forced else None

    def push(self, token: int) -> None:
        budget = self._budget
        if self._forced:
            self._forced = self._forced[1:]
            self._is_thinking = False
            return
        if not self._is_thinking:
            self._last = (*self._last, token)[-len(budget.start_ids) :]
            self._is_thinking = self._last == budget.start_ids
        elif token in budget.end_ids:
            self._is_thinking = False
            self._last = ()
        else:
            self._num_thought += 1
        self._force_if_spent()

    def _force_if_spent(self) -> None:
        if self._is_thinking and self._num_thought >= self._budget.max_tokens:
            self._forced = self._budget.forced_ids
