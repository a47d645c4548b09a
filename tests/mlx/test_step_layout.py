"""What rows that decode see of their slots, against the definition of it."""

from __future__ import annotations

from itertools import product

import mlx.core as mx
import pytest

from mlx_lm_server.core.plan import RowWork
from mlx_lm_server.runner.loading.tiny_plans import plan_of
from mlx_lm_server.runner.state.kv_storage import RING_SPARE
from mlx_lm_server.runner.state.step_layout import SlotsView, layout_of

CAPACITY, WINDOW = 64, 12
RING = WINDOW + RING_SPARE
# The last position of each slot; None where no row takes part.
SLOTS = [
    *[(last,) for last in range(30)],
    *product((5, 11, 12, 19, 20), repeat=2),
    (11, None, 11),
    (12, None, 11),
    (None, 4),
    (25, None, None, 25),
]


def _view(slots: tuple[int | None, ...], window: int | None, ring: int | None) -> SlotsView:
    works = [RowWork(n, 0, n, last) for n, last in enumerate(slots) if last is not None]
    layout = layout_of(plan_of(works), {0: CAPACITY})
    return layout.view_of(layout.decodes[0], window, ring)


def _sees(last: int, place: int, window: int | None, ring: int | None) -> bool:
    held = [p for p in range(last + 1) if (p if ring is None else p % ring) == place]
    return bool(held) and (window is None or last - held[-1] < window)


@pytest.mark.parametrize(
    ("window", "ring"),
    [(None, None), (WINDOW, None), (WINDOW, RING)],
    ids=["all", "window", "ring"],
)
@pytest.mark.parametrize("slots", SLOTS, ids=str)
def test_a_row_sees_its_last_tokens_up_to_the_window(
    slots: tuple[int | None, ...], window: int | None, ring: int | None
) -> None:
    view = _view(slots, window, ring)
    mask = view.mask(3)
    for slot, last in enumerate(slots):
        if last is None:
            continue
        wanted = [_sees(last, place, window, ring) for place in range(view.length)]
        assert sum(wanted) == min(last + 1, window or last + 1)
        assert mask is not None or all(wanted)
        if mask is not None:
            assert mask[slot].tolist() == [[wanted]] * 3


def test_rows_of_one_length_need_no_mask_and_others_one_for_all_layers() -> None:
    for window, ring in ((None, None), (WINDOW, None), (WINDOW, RING)):
        assert _view((11, None, 11), window, ring).mask(2) is None
    view = _view((9, 4), None, None)
    assert view.mask(2) is view.mask(2)
    scores = mx.zeros((2, 2, 1, 10))
    bias = view.bias_of(scores)
    assert bias is not None
    assert bias is view.bias_of(mx.ones((2, 2, 1, 10)))
    assert mx.array_equal(bias == 0, view.mask(2))
