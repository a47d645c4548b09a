"""Tokens are copied as bytes, by threads in C and without them."""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx
import pytest

from mlx_lm_server.native.memory import SECTOR_BYTES, address_of, unwritten_bytes
from mlx_lm_server.runner.backends.x86 import native_products
from mlx_lm_server.runner.state.plane_spans import PlaneCopies, Span

WAYS = [
    pytest.param(
        "C", marks=pytest.mark.skipif(native_products.library() is None, reason="no such library")
    ),
    "Python",
]
DTYPES = pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.uint32])
HEADS = 2


@pytest.fixture(params=WAYS)
def copies(request: pytest.FixtureRequest) -> PlaneCopies:
    return PlaneCopies(native_products.copy_heads() if request.param == "C" else None)


def plane_of(num_slots: int, places: int, width: int, dtype: mx.Dtype) -> mx.array:
    plane = mx.random.randint(0, 1 << 16, (num_slots, HEADS, places, width)).astype(dtype)
    mx.eval(plane)
    return plane


def tokens_of(plane: mx.array, span: Span) -> mx.array:
    return plane[span.slot, :, span.start : span.start + span.num_tokens]


@DTYPES
def test_spans_go_to_other_places_and_nothing_else_changes(
    dtype: mx.Dtype, copies: PlaneCopies
) -> None:
    """Planes of two widths, some large enough for all threads."""
    pairs = [
        (plane_of(3, 300, width, dtype), plane_of(2, 700, width, dtype)) for width in (8, 512, 8)
    ]
    spans = [
        (Span(2, 0, 300), Span(0, 400, 300)),
        (Span(0, 7, 1), Span(1, 0, 1)),
        (Span(1, 5, 0), Span(1, 9, 0)),
        (Span(1, 290, 10), Span(0, 0, 10)),
    ]
    wanted = []
    for source, target in pairs:
        expected = target + 0
        for old, new in spans:
            stop = new.start + new.num_tokens
            expected[new.slot, :, new.start : stop] = tokens_of(source, old)
        mx.eval(expected)
        wanted.append(expected)
    copies.between(pairs, spans)
    for (_, target), expected in zip(pairs, wanted, strict=True):
        assert mx.array_equal(target, expected)


@DTYPES
def test_what_goes_out_comes_in_bit_by_bit(dtype: mx.Dtype, copies: PlaneCopies) -> None:
    planes = [plane_of(3, 160, 64, dtype) for _ in range(5)]
    spans = [Span(0, 0, 16), Span(2, 144, 16), Span(1, 3, 1), Span(1, 16, 16), Span(0, 0, 160)]
    taken = copies.out(planes, spans)
    for span, copy in zip(spans, taken, strict=True):
        stacked = mx.stack([tokens_of(plane, span) for plane in planes])
        assert copy.tobytes() == bytes(memoryview(stacked))  # type: ignore[arg-type]
    others = [mx.zeros_like(plane) for plane in planes]
    mx.eval(others)
    copies.into(others, spans, [taken[0], bytes(taken[1]), *taken[2:]])
    for plane, other in zip(planes, others, strict=True):
        for span in spans:
            assert mx.array_equal(tokens_of(plane, span), tokens_of(other, span))
        assert not mx.any(other[1, :, 32:])


def test_what_goes_out_begins_at_a_sector_and_stays_as_it_is(copies: PlaneCopies) -> None:
    planes = [plane_of(1, 64, 64, mx.float32)]
    taken = copies.out(planes, [Span(0, 0, 16), Span(0, 16, 16)])
    before = [bytes(copy) for copy in taken]
    assert all(address_of(copy) % SECTOR_BYTES == 0 for copy in taken)
    assert all(copy.readonly for copy in taken)
    planes[0][:] = 0.0
    mx.eval(planes)
    assert [bytes(copy) for copy in taken] == before


@pytest.mark.parametrize(
    "span", [Span(2, 0, 4), Span(0, 17, 4), Span(0, -1, 4), Span(-1, 0, 4), Span(0, 8, -4)]
)
@pytest.mark.parametrize(
    "copy",
    [
        lambda copies, plane, span: copies.between([(plane, plane)], [(span, other(span))]),
        lambda copies, plane, span: copies.between([(plane, plane)], [(other(span), span)]),
        lambda copies, plane, span: copies.out([plane], [span]),
        lambda copies, plane, span: copies.into([plane], [span], [bytes(4 * HEADS * 8 * 4)]),
    ],
    ids=["from", "to", "out", "in"],
)
def test_nothing_outside_of_a_plane_is_touched(
    copy: Callable[[PlaneCopies, mx.array, Span], None], span: Span, copies: PlaneCopies
) -> None:
    with pytest.raises(ValueError, match=r"outside|bytes|size"):
        copy(copies, plane_of(2, 20, 8, mx.float32), span)


def other(span: Span) -> Span:
    return Span(0, 0, span.num_tokens)


def test_what_does_not_fit_is_refused(copies: PlaneCopies) -> None:
    plane = plane_of(2, 20, 8, mx.float32)
    with pytest.raises(ValueError, match="different length"):
        copies.between([(plane, plane)], [(Span(0, 0, 16), Span(1, 18, 2))])
    with pytest.raises(ValueError, match="do not fit"):
        copies.between([(plane, plane_of(2, 20, 4, mx.float32))], [(Span(0, 0, 4), Span(0, 0, 4))])


def test_nothing_is_copied_of_planes_and_spans_that_are_empty(copies: PlaneCopies) -> None:
    empty, plane = mx.zeros((2, HEADS, 20, 0)), plane_of(2, 20, 8, mx.float32)
    mx.eval(empty)
    copies.between([(empty, empty), (plane, plane)], [(Span(0, 0, 4), Span(1, 0, 4))])
    assert mx.array_equal(plane[0, :, :4], plane[1, :, :4])
    assert [bytes(copy) for copy in copies.out([empty], [Span(0, 0, 4)])] == [b""]
    assert [bytes(copy) for copy in copies.out([plane], [Span(0, 4, 0)])] == [b""]
    copies.into([empty], [Span(0, 0, 4)], [b""])


def test_bytes_that_are_too_few_are_refused(copies: PlaneCopies) -> None:
    with pytest.raises(ValueError, match="other planes"):
        copies.into([plane_of(2, 20, 8, mx.float32)], [Span(0, 0, 4)], [bytes(8)])


@pytest.mark.parametrize("num_bytes", [0, 1, 512, 100_000])
def test_memory_that_nobody_wrote_begins_at_a_sector(num_bytes: int) -> None:
    room = unwritten_bytes(num_bytes)
    assert len(room) == num_bytes
    assert address_of(room) % SECTOR_BYTES == 0
    room[:] = bytes(num_bytes)


def test_what_native_code_refuses_is_told() -> None:
    plane = plane_of(2, 20, 8, mx.float32)
    with pytest.raises(ValueError, match="cannot be made"):
        PlaneCopies(lambda *_: 0).between([(plane, plane)], [(Span(0, 0, 4), Span(1, 0, 4))])
