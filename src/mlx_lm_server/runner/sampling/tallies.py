"""What penalties and allowed tokens ask of a row's past, as lines of one table on the device.

A line `[vocab]` has a number for each token: how often the row has drawn it, a half more where its
prompt has it, minus infinity where it is never drawn. So all rows of a step take one gather and one
operation, and the tokens that they drew one scatter, which waits for the next draw: only then is
nobody reading the table, so that it is written in place.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import mlx.core as mx

from mlx_lm_server.protocol import SamplingParams

IN_PROMPT = 0.5
# A line that nobody reads: where drawn tokens go that nobody counts.
UNREAD = 0
FEWEST_LINES = 4


@dataclass(slots=True, eq=False)
class Tally:
    """Of one row. `line` is its place in the table, once it has one, `first` what it has at first;
    `uncounted` are tokens that the host knows and the line does not."""

    first: mx.array | None
    counts: bool
    line: int = UNREAD
    uncounted: list[int] = field(default_factory=list)

    def take(self, tokens: Sequence[int]) -> None:
        """Counts tokens that the host knows."""
        if self.counts:
            self.uncounted += tokens


def start_tally(
    params: SamplingParams, prompt_ids: Sequence[int], output_ids: Sequence[int], vocab_size: int
) -> Tally | None:
    """Returns None for a row to which its past and all tokens are alike."""
    has_repetition = params.repetition_penalty != 1.0
    counts = bool(params.presence_penalty or params.frequency_penalty or has_repetition)
    if not counts and not params.allowed_token_ids:
        return None
    line = mx.zeros(vocab_size)
    if counts and prompt_ids:
        line = line.at[_ids(prompt_ids)].maximum(IN_PROMPT)
    if counts and output_ids:
        line = line.at[_ids(output_ids)].add(1.0)
    if params.allowed_token_ids:
        only = mx.full((vocab_size,), -mx.inf)
        only[_ids(params.allowed_token_ids)] = 0.0
        line = line + only
    return Tally(line, counts)


def _ids(ids: Sequence[int]) -> mx.array:
    return mx.array(list(ids), mx.int32)


class TallyTable:
    """`[lines, vocab]` float32, which grows and shrinks with the rows that need it. Owned by the
    sampler."""

    def __init__(self, vocab_size: int) -> None:
        self._vocab_size = vocab_size
        self._table: mx.array | None = None
        self._free: list[int] = []
        self._num_held = 0
        # What the last draw gave, and whose lines it is to be counted in, place by place.
        self._drawn: tuple[mx.array, list[int]] | None = None

    @property
    def nbytes(self) -> int:
        return 0 if self._table is None else self._table.nbytes

    def of(self, tallies: Sequence[Tally], tried: Sequence[Sequence[int]]) -> mx.array:
        """Returns the lines `[n, vocab]` as if the tokens in `tried` had been drawn too."""
        self._count_drawn()
        several = list(dict.fromkeys(tallies))
        self._take_in([tally for tally in several if tally.first is not None])
        known = [(tally.line, token) for tally in several for token in tally.uncounted]
        if known:
            self._table = _counted(self._held, known)
            for tally in several:
                tally.uncounted.clear()
        lines = self._held[mx.array([tally.line for tally in tallies])]
        more = [(place, token) for place, tokens in enumerate(tried) for token in tokens]
        return _counted(lines, more) if more else lines

    def will_count(self, tokens: mx.array, tallies: Sequence[Tally | None]) -> None:
        """Takes what is drawn, place by place, with the tallies that it is counted in."""
        self._count_drawn()
        lines = [tally.line if tally is not None and tally.counts else UNREAD for tally in tallies]
        self._drawn = (tokens, lines) if any(lines) else None

    def let_go(self, tally: Tally) -> None:
        """Takes back the line of a row that has ended."""
        if tally.line == UNREAD:
            return
        self._free.append(tally.line)
        self._num_held -= 1
        tally.line = UNREAD
        if not self._num_held:
            self._table, self._free, self._drawn = None, [], None

    @property
    def _held(self) -> mx.array:
        assert self._table is not None, "a row has a line"
        return self._table

    def _count_drawn(self) -> None:
        if self._drawn is not None:
            tokens, lines = self._drawn
            self._table = self._held.at[mx.array(lines), tokens].add(1.0)
            self._drawn = None

    def _take_in(self, newcomers: Sequence[Tally]) -> None:
        firsts = [tally.first for tally in newcomers if tally.first is not None]
        if not firsts:
            return
        self._make_room(len(newcomers))
        for tally in newcomers:
            tally.line, tally.first = self._free.pop(), None
        self._held[mx.array([tally.line for tally in newcomers])] = mx.stack(firsts)
        self._num_held += len(newcomers)

    def _make_room(self, num: int) -> None:
        if len(self._free) >= num:
            return
        before = 0 if self._table is None else self._table.shape[0]
        wanted = FEWEST_LINES
        while wanted < self._num_held + num:
            wanted *= 2
        more = mx.zeros((1 + wanted - before, self._vocab_size))
        self._table = more if self._table is None else mx.concatenate([self._table, more])
        self._free += reversed(range(max(before, UNREAD + 1), 1 + wanted))


def _counted(lines: mx.array, places: Sequence[tuple[int, int]]) -> mx.array:
    """Returns the lines with one more in each place."""
    rows, tokens = (mx.array(column, mx.int32) for column in zip(*places, strict=True))
    return lines.at[rows, tokens].add(1.0)
