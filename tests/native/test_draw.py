"""The draw in C gives a token of the vocabulary whatever it is asked, and reads no further."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from mlx_lm_server import native
from mlx_lm_server.runner.backends.x86.native_draw import _RowParams, knows_fields
from tests.native.door import Floats, needs_library, normal

pytestmark = needs_library

FAIR = (1.0, 0.0, 1.0, 0)
# Inverse temperature, min-p, top-p, top-k.
EDGES = [
    FAIR,
    (0.0, 0.0, 1.0, 0),
    (math.inf, 0.0, 1.0, 0),
    (math.nan, math.nan, math.nan, 1),
    (-1.0, 0.0, 0.5, 0),
    *((1.0, min_p, 1.0, 0) for min_p in (0.1, 1.0, 2.0, -1.0)),
    *((1.0, 0.0, top_p, 0) for top_p in (0.0, 1e-30, 0.5, 0.999999, -1.0)),
    *((1.0, 0.0, 1.0, top_k) for top_k in (1, 2, 63, 64, 129, 130, 131, 2**31 - 1, -5)),
    (0.7, 0.05, 0.9, 20),
]


def draw(logits: Floats, params: Sequence[tuple[float, float, float, int]]) -> list[int]:
    library, (num_rows, vocab_size) = native.load("draw"), logits.shape
    assert library is not None
    rows = (_RowParams * num_rows)(*(_RowParams(*row, 7, 11) for row in params))
    scratch, tokens = np.empty(2 * vocab_size, np.float32), np.full(num_rows, -1, np.int32)
    arrays = (ctypes.c_void_p(x.ctypes.data) for x in (logits, scratch, tokens))
    where, room, found = arrays
    assert library.draw_rows(num_rows, vocab_size, where, rows, room, found)
    return [int(token) for token in tokens]


@pytest.mark.parametrize("vocab_size", [1, 2, 63, 64, 65, 130])
def test_every_row_gets_a_token(vocab_size: int) -> None:
    logits = 3 * normal(len(EDGES), vocab_size)
    assert all(0 <= token < vocab_size for token in draw(logits, EDGES))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 3e38, -3e38])
@pytest.mark.parametrize("num_odd", [1, 65, 130])
def test_logits_at_the_edge_of_numbers(value: float, num_odd: int) -> None:
    logits = normal(len(EDGES), 130)
    logits[:, -num_odd:] = value
    assert all(0 <= token < 130 for token in draw(logits, EDGES))


def test_the_most_likely_token_is_drawn_where_no_other_is_kept() -> None:
    logits = normal(3, 130)
    only_one = [(0.0, 0.0, 1.0, 0), (1.0, 0.0, 1.0, 1), (1.0, 0.0, 0.0, 0)]
    assert draw(logits, only_one) == list(logits.argmax(axis=1))


@pytest.mark.parametrize(
    "odd",
    [{"rows": -1}, {"vocab": 0}, {"vocab": -1}, *({n: None} for n in ("logits", "params", "room"))],
    ids=str,
)
def test_what_cannot_be_drawn_from_is_refused(odd: dict[str, Any]) -> None:
    library, tokens = native.load("draw"), np.full(2, -1, np.int32)
    assert library is not None
    logits, scratch = normal(2, 8), normal(16)
    asked: dict[str, Any] = {
        "rows": 2,
        "vocab": 8,
        "logits": ctypes.c_void_p(logits.ctypes.data),
        "params": (_RowParams * 2)(),
        "room": ctypes.c_void_p(scratch.ctypes.data),
    }
    found = ctypes.c_void_p(tokens.ctypes.data)
    assert not library.draw_rows(*(asked | odd).values(), found)
    assert not library.draw_rows(*asked.values(), None)
    assert list(tokens) == [-1, -1]
    assert library.draw_rows(*(asked | {"rows": 0}).values(), found)


def test_the_library_has_the_fields_that_the_caller_has() -> None:
    library = native.load("draw")
    assert library is not None
    assert knows_fields(library)
