"""Who asks how far a prompt is, is told each step; of the others the server hears now and then."""

from __future__ import annotations

from mlx_lm_server.core.plan import JoinedRow, RowWork, StepPlan
from mlx_lm_server.engine.prefill_progress import PrefillProgress
from mlx_lm_server.protocol import SamplingParams

SAMPLING = SamplingParams(max_tokens=4, seed=0)


class Clock:
    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def chunk(row: int, start: int, num: int, yields: int = 0) -> RowWork:
    return RowWork(row, 0, row, start, tuple(range(num)), yields)


def joined(req_id: str, row: int, output_ids: tuple[int, ...] = ()) -> JoinedRow:
    return JoinedRow(req_id, row, tuple(range(8)), output_ids, SAMPLING)


def test_a_prompt_that_nobody_asks_about_is_told_once_a_second() -> None:
    clock = Clock()
    progress = PrefillProgress(clock)
    progress.watch("asks")
    rows = (joined("asks", 0), joined("quiet", 1), joined("again", 2, (7,)))
    told = [
        (output.req_id, output.num_computed_tokens)
        for step, now_s in enumerate((100.0, 100.5, 101.1))
        for clock.now_s in [now_s]
        for output in progress.after(
            StepPlan(
                step,
                joined_rows=() if step else rows,
                chunks=tuple(chunk(row, 2 * step, 2) for row in range(3)),
            )
        )
    ]
    assert told == [
        *(("asks", 2), ("quiet", 2), ("again", 2)),
        ("asks", 4),
        *(("asks", 6), ("quiet", 6), ("again", 6)),
    ]


def test_the_last_chunk_of_a_quiet_prompt_tells_by_its_token() -> None:
    progress = PrefillProgress(Clock())
    plan = StepPlan(1, joined_rows=(joined("quiet", 0),), chunks=(chunk(0, 0, 8, yields=1),))
    assert progress.after(plan) == []


def test_what_a_row_did_not_compute_itself_was_found() -> None:
    progress = PrefillProgress(Clock())
    plan = StepPlan(1, joined_rows=(joined("quiet", 0),), chunks=(chunk(0, 5, 2),))
    [output] = progress.after(plan)
    assert (output.num_computed_tokens, output.num_reused_tokens) == (7, 5)
