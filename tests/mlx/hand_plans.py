"""Plans written by hand for a real model runner: prompts cut in different ways side by side, and
tokens taken back, which no scheduler orders yet."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from mlx_lm_server.core.plan import (
    CreateSlab,
    JoinedRow,
    LoadState,
    RowWork,
    SaveState,
    StepPlan,
)
from mlx_lm_server.protocol import LoadModel
from mlx_lm_server.runner.loading import loader
from mlx_lm_server.runner.model_runner import ModelRunner
from mlx_lm_server.runner.state.kv_storage import RING_SPARE
from tests.back_ends import BACKEND

from .driver import GREEDY
from .tiny_models import VOCAB_SIZE

SLABS = (CreateSlab(0, 2, 640), CreateSlab(1, 4, 192))
TAKE_BACK_EVERY = 3


@dataclass(frozen=True)
class Turn:
    """What a row does in one step."""

    work: RowWork
    saves: tuple[SaveState, ...] = ()
    loads: tuple[LoadState, ...] = ()


@dataclass
class HandRow:
    """Reads its prompt by `chunk` tokens. With `takes_back`, each third token comes after wrong
    ones, one more each time up to RING_SPARE, that are taken back."""

    slab_id: int
    slot: int
    prompt: list[int]
    chunk: int
    takes_back: bool = False
    tokens: list[int] = field(default_factory=list)


class HandPlans:
    """One model and the rows that are given it. A row goes on from an earlier position by naming
    it; recurrent state goes on from what was saved there."""

    def __init__(self, folder: Path, max_rows: int) -> None:
        order = LoadModel(str(folder))
        loaded = loader.load(order, BACKEND, lambda _stage, _fraction: None)
        self.runner = ModelRunner(loaded, BACKEND, max_rows)
        self._has_state = self.runner.geometry.bytes_per_row > 0

    def run(self, rows: Sequence[HandRow], num_tokens: int) -> None:
        """One more row joins with each step; each leaves when it has its tokens."""
        lives = {n: self._life_of(n, row, num_tokens) for n, row in enumerate(rows)}
        joined = 0
        while lives:
            newcomers = range(joined, min(joined + 1, len(rows)))
            joined += len(newcomers)
            turns = {n: next(lives[n], None) for n in lives if n < joined}
            gone = tuple(n for n, turn in turns.items() if turn is None)
            for n in gone:
                del lives[n]
            self._step(rows, [turn for turn in turns.values() if turn], gone, newcomers)

    def _life_of(self, number: int, row: HandRow, num_tokens: int) -> Iterator[Turn]:
        place = (number, row.slab_id, row.slot)
        for start in range(0, len(row.prompt), row.chunk):
            part = tuple(row.prompt[start : start + row.chunk])
            yield Turn(RowWork(*place, start, part, int(start + len(part) == len(row.prompt))))
        num_wrong = 0
        while len(row.tokens) < num_tokens:
            position = len(row.prompt) + len(row.tokens) - 1
            if row.takes_back and len(row.tokens) % TAKE_BACK_EVERY == 0:
                num_wrong = num_wrong % RING_SPARE + 1
                yield from self._wrong_then_right(place, position, num_wrong, row.tokens[-1])
            else:
                yield Turn(RowWork(*place, position))

    def _wrong_then_right(
        self, place: tuple[int, int, int], position: int, num_wrong: int, token: int
    ) -> Iterator[Turn]:
        state = (place[0], *place, position)
        others = ((token + 1) % VOCAB_SIZE,) * num_wrong
        wrong = RowWork(*place, position, others, yields=0)
        yield Turn(wrong, saves=(SaveState(*state),) if self._has_state else ())
        right = RowWork(*place, position, (token,), yields=1)
        yield Turn(right, loads=(LoadState(*state),) if self._has_state else ())

    def _step(
        self,
        rows: Sequence[HandRow],
        turns: Sequence[Turn],
        left: tuple[int, ...],
        newcomers: range,
    ) -> None:
        work = [turn.work for turn in turns]
        decodes = [one for one in work if one.token_ids is None]
        plan = StepPlan(
            step=0,
            left_rows=left,
            joined_rows=tuple(
                JoinedRow(str(n), n, tuple(rows[n].prompt), (), GREEDY) for n in newcomers
            ),
            kv_ops=SLABS if 0 in newcomers else (),
            decodes=tuple(sorted(decodes, key=lambda one: (one.slab_id, one.slot))),
            chunks=tuple(one for one in work if one.token_ids is not None),
            saves=tuple(save for turn in turns for save in turn.saves),
            loads=tuple(load for turn in turns for load in turn.loads),
        )
        for result in self.runner.submit(plan).collect():
            for number, given in result.items():
                rows[number].tokens += given.token_ids
