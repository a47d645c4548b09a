"""Shows that a measurement goes on: a bar in a terminal, a line per round everywhere else.

Both go to stderr, so that a file that stdout is sent to has the table alone, and both cost next to
nothing, since they share the machine with what is measured.
"""

from __future__ import annotations

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from mlx_lm_server.bench.report import LETTERS
from mlx_lm_server.bench.session import Outcome

FIRST = "counting tokens"


class RoundBar:
    """Shows which round runs, from `start` to `stop`; redrawn seldom."""

    def __init__(self, num_rounds: int, console: Console) -> None:
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=console,
            refresh_per_second=2,
            transient=True,
        )
        self._task = self._progress.add_task(FIRST, total=num_rounds)

    def start(self) -> None:
        self._progress.start()

    def stop(self) -> None:
        self._progress.stop()

    def round_started(self, outcome: Outcome, round_index: int) -> None:
        self._progress.update(self._task, description=_round(outcome, round_index))

    def round_ended(self, outcome: Outcome) -> None:
        self._progress.advance(self._task)


class RoundLines:
    """Says what begins before it does."""

    def __init__(self, num_rounds: int, console: Console) -> None:
        self._num_rounds = num_rounds
        self._num_started = 0
        self._console = console

    def start(self) -> None:
        self._say(FIRST)

    def stop(self) -> None:
        """No line is taken back."""

    def round_started(self, outcome: Outcome, round_index: int) -> None:
        self._num_started += 1
        self._say(f"[{self._num_started}/{self._num_rounds}] {_round(outcome, round_index)}")

    def round_ended(self, outcome: Outcome) -> None:
        """The next line says so."""

    def _say(self, line: str) -> None:
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)
        self._console.file.flush()


def progress_of(num_rounds: int, console: Console) -> RoundBar | RoundLines:
    """The one that suits where the console writes to."""
    return RoundBar(num_rounds, console) if console.is_terminal else RoundLines(num_rounds, console)


def _round(outcome: Outcome, round_index: int) -> str:
    where = f"{LETTERS[outcome.place]} {outcome.target.url}"
    return f"{outcome.workload}, round {round_index + 1}, {where}"
