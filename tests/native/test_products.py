"""Products, and what travels as one, read and write no further than the call says."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from mlx_lm_server.runner.backends.x86 import native_products as words
from tests.native.door import (
    COLUMN_MAJOR,
    INT_MAX,
    NO_TRANS,
    TRANS,
    UNTOUCHED,
    Array,
    Call,
    Floats,
    lying,
    needs_library,
    normal,
)

pytestmark = needs_library

ALPHAS = {
    "nibbles": words.NIBBLES_ALPHA,
    "bytes": words.BYTES_ALPHA,
    "swiglu": words.SWIGLU_ALPHA,
    "attention": words.ATTENTION_ALPHA,
    "norm": words.RMS_NORM_ALPHA,
    "rotation": words.ROTATION_ALPHA,
}


def empty(m: int, n: int, ldc: int) -> Floats:
    return np.full((m - 1) * ldc + n, UNTOUCHED, np.float32)


@pytest.mark.parametrize("gap", [0, 3])
@pytest.mark.parametrize(
    ("n", "k"), [(1, 16), (7, 64), (130, 48), (61, 80), (200, 64), (5, 40), (3, 7)]
)
@pytest.mark.parametrize("m", [1, 2, 3, 5, 8, 9, 16, 17, 20, 31, 48, 70])
def test_rows_times_rows(m: int, n: int, k: int, gap: int) -> None:
    a, b = normal(m, k), normal(n, k, seed=1)
    lda, ldb, ldc = k + gap, k + 2 * gap, n + gap
    call = Call(m, n, k, lying(a, lda), lda, lying(b, ldb), ldb, empty(m, n, ldc), ldc)
    assert np.allclose(replace(call, trans_b=TRANS).answer(), a @ b.T, atol=1e-4)


@pytest.mark.parametrize("gap", [0, 3])
@pytest.mark.parametrize(("n", "k"), [(16, 1), (64, 77), (80, 5), (256, 3), (40, 9), (7, 4)])
@pytest.mark.parametrize("m", [1, 2, 3, 4, 7, 16, 17])
def test_rows_times_columns(m: int, n: int, k: int, gap: int) -> None:
    a, b = normal(m, k), normal(k, n, seed=1)
    lda, ldb, ldc = k + gap, n + 2 * gap, n + gap
    call = Call(m, n, k, lying(a, lda), lda, lying(b, ldb), ldb, empty(m, n, ldc), ldc)
    assert np.allclose(call.answer(), a @ b, atol=1e-4)


def packed(codes: Array, bits: int, stride: int) -> Array:
    flat = lying(codes, stride)
    if bits == 8:
        return flat
    pairs = np.pad(flat, (0, len(flat) % 2)).reshape(-1, 2) & 15
    return pairs[:, 0] | pairs[:, 1] << 4


@pytest.mark.parametrize("gap", [0, 16])
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("m", [1, 2, 3, 4, 5, 9])
@pytest.mark.parametrize("length", [1, 3, 7, 61])
def test_rows_times_codes(m: int, length: int, bits: int, gap: int) -> None:
    codes = np.random.default_rng(length).integers(0, 1 << bits, (length, 48), np.uint8)
    alpha = words.BYTES_ALPHA if bits == 8 else words.NIBBLES_ALPHA
    b, ldb = packed(codes, bits, 48 + gap), 48 + gap
    for x, trans, n in ((normal(m, 48), TRANS, length), (normal(m, length), NO_TRANS, 48)):
        k, ldc = x.shape[1], n + 1
        call = Call(m, n, k, lying(x, k + 1), k + 1, b, ldb, empty(m, n, ldc), ldc, alpha, 1.0)
        expected = x @ (codes.T if trans == TRANS else codes).astype(np.float32)
        assert np.allclose(replace(call, trans_b=trans).answer(), expected, rtol=1e-4, atol=1e-2)


def by_row(alpha: float, x: Floats, c: Floats, b: Array, *, as_columns: bool = False) -> Call:
    m, n = x.shape
    a = lying(x.T, m + 1) if as_columns else x.copy()
    lda, trans_a = (m + 1, TRANS) if as_columns else (n, NO_TRANS)
    return Call(m, n, n, a, lda, b, n, c.reshape(-1).copy(), n, alpha, 1.0, trans_a=trans_a)


@pytest.mark.parametrize("as_columns", [False, True])
@pytest.mark.parametrize(("m", "n"), [(1, 1), (1, 7), (3, 100), (5, 64), (2, 513), (70, 1024)])
def test_norms_and_swiglu(m: int, n: int, as_columns: bool) -> None:
    x, c, nothing = normal(m, n), normal(m, n, seed=1), np.zeros(1, np.float32)
    norm = by_row(words.RMS_NORM_ALPHA, x, c, nothing, as_columns=as_columns).answer()
    assert np.allclose(norm, c * x / np.sqrt((x * x).mean(axis=1, keepdims=True)), atol=1e-4)
    swiglu = by_row(words.SWIGLU_ALPHA, x, c, nothing, as_columns=as_columns).answer()
    assert np.allclose(swiglu, c / (1 + np.exp(-c)) * x, atol=1e-4)


@pytest.mark.parametrize(("dim", "dims"), [(1, 0), (2, 2), (64, 64), (100, 6), (5, 4)])
def test_rotations(dim: int, dims: int) -> None:
    x, angles = normal(3, dim), normal(dims // 2, seed=1)
    table = np.concatenate([[np.float32(dims)], np.cos(angles), np.sin(angles)]).astype(np.float32)
    one, two = x[:, : dims // 2], x[:, dims // 2 : dims]
    expected = np.concatenate(
        [
            one * np.cos(angles) - two * np.sin(angles),
            one * np.sin(angles) + two * np.cos(angles),
            x[:, dims:],
        ],
        axis=1,
    )
    answer = by_row(words.ROTATION_ALPHA, x, np.zeros_like(x), table).answer()
    assert np.allclose(answer, expected, atol=1e-5)


@pytest.mark.parametrize(
    "dims", [-2.0, 3.0, 0.5, 66.0, 1e30, -1e30, np.nan, np.inf, 64.001], ids=str
)
def test_a_rotation_of_no_such_numbers_gives_nan(dims: float) -> None:
    x = normal(3, 64)
    table = np.array([dims], np.float32)
    assert np.isnan(by_row(words.ROTATION_ALPHA, x, np.zeros_like(x), table).answer()).all()


def whole(alpha: float) -> Call:
    """A call that fits, of what is not attention."""
    x, c = normal(4, 32), normal(4, 32, seed=1)
    return by_row(alpha, x, c, np.zeros(32 * 32, np.float32))


ODD_OPERANDS: list[dict[str, Any]] = [
    {"k": 0},
    {"k": -1},
    {"k": INT_MAX},
    {"lda": 31},
    {"lda": 0},
    {"lda": -32},
    {"ldb": 31},
    {"ldb": -INT_MAX},
    {"a": None},
    {"b": None},
    {"trans_a": 0},
    {"trans_b": 113},
    {"order": COLUMN_MAJOR, "m": 32, "n": 4, "lda": 4},
]


@pytest.mark.parametrize("odd", ODD_OPERANDS, ids=str)
@pytest.mark.parametrize("kind", sorted(ALPHAS.keys() - {"attention"}))  # test_attention.py has it
def test_operands_that_do_not_fit_give_nan(kind: str, odd: dict[str, Any]) -> None:
    call = replace(whole(ALPHAS[kind]), **odd)
    call.run()
    assert call.c is not None
    assert np.isnan(call.c).all()


@pytest.mark.parametrize(
    "odd",
    [
        {"order": 0},
        {"c": None},
        {"ldc": 31},
        {"ldc": -32},
        {"m": 0},
        {"m": -1},
        {"m": -INT_MAX - 1},
        {"n": 0},
        {"n": -1},
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", ALPHAS)
def test_where_no_answer_can_stand_nothing_is_written(kind: str, odd: dict[str, Any]) -> None:
    whole_one = whole(ALPHAS[kind])
    assert whole_one.c is not None
    before = whole_one.c.copy()
    replace(whole_one, **odd).run()
    assert np.array_equal(whole_one.c, before)


@pytest.mark.parametrize(
    "odd",
    [
        {"n": 33},
        {"n": 33, "ldb": 33},
        {"lda": 33},
        {"ldb": 33},
        {"ldc": 40},
        {"trans_b": TRANS},
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", ["norm", "swiglu", "rotation"])
def test_rows_and_a_matrix_of_another_size_give_nan(kind: str, odd: dict[str, Any]) -> None:
    call = replace(whole(ALPHAS[kind]), **odd)
    call = replace(call, c=empty(call.m, call.n, max(call.n, call.ldc)), ldc=max(call.n, call.ldc))
    assert np.isnan(call.answer()).all()


@pytest.mark.parametrize(
    "odd", [{"trans_a": TRANS}, {"k": 17, "trans_b": TRANS}, {"n": 17}], ids=str
)
@pytest.mark.parametrize("bits", [8, 4])
def test_codes_that_are_no_whole_vectors_give_nan(bits: int, odd: dict[str, Any]) -> None:
    alpha = words.BYTES_ALPHA if bits == 8 else words.NIBBLES_ALPHA
    call = replace(whole(alpha), **odd)
    assert np.isnan(replace(call, c=empty(call.m, call.n, call.ldc)).answer()).all()


def test_nibbles_that_begin_within_a_byte_give_nan() -> None:
    assert np.isnan(replace(whole(words.NIBBLES_ALPHA), ldb=33).answer()).all()


@pytest.mark.parametrize(
    "odd",
    [{"lda": 31}, {"ldb": 31}, {"ldc": 31}, {"m": 0}, {"n": 0}, {"m": -1}, {"n": -1}],
    ids=str,
)
@pytest.mark.parametrize("trans", [TRANS, NO_TRANS])
def test_a_plain_product_that_does_not_fit_is_left_to_the_whole_blas(
    odd: dict[str, Any], trans: int
) -> None:
    """Which says so and touches nothing."""
    call = replace(whole(1.0), beta=0.0, trans_b=trans)
    assert call.c is not None
    before = call.c.copy()
    replace(call, **odd).run()
    assert np.array_equal(call.c, before)


def test_nothing_times_nothing_is_looked_for_where_there_is_a_row() -> None:
    nowhere = np.empty(0, np.float32)
    replace(whole(1.0), a=nowhere, b=nowhere, m=0, k=8, lda=8, beta=0.0).run()
