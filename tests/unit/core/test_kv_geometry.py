from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from mlx_lm_server.core.kv_geometry import KVGeometry, RingBytes
from mlx_lm_server.core.kv_layout import KVLayout
from mlx_lm_server.core.slab_rules import SlabRules

GEOMETRIES = st.builds(
    KVGeometry,
    st.integers(0, 50),
    st.lists(st.builds(RingBytes, st.integers(1, 300), st.integers(1, 50)), max_size=3).map(tuple),
    st.integers(0, 500),
)


@given(GEOMETRIES, st.integers(0, 100_000))
def test_the_longest_row_fits_and_a_longer_one_does_not(geometry: KVGeometry, num_bytes: int):
    tokens = geometry.tokens_in(num_bytes, most=5000)
    assert tokens == 0 or geometry.row_bytes(tokens) <= num_bytes
    assert tokens == 5000 or geometry.row_bytes(tokens + 1) > num_bytes


def test_a_full_ring_takes_no_more():
    geometry = KVGeometry(10, (RingBytes(32, 5),), bytes_per_row=7)
    assert geometry.slot_bytes(32) == 32 * 15
    assert geometry.slot_bytes(1000) == 1000 * 10 + 32 * 5
    assert geometry.row_bytes(1000) - geometry.slot_bytes(1000) == 7


@given(GEOMETRIES, st.lists(st.integers(1, 400), min_size=1, max_size=12))
def test_a_layout_never_holds_more_than_its_limit(geometry: KVGeometry, lengths: list[int]):
    layout = KVLayout(geometry, limit_bytes=60_000, rules=SlabRules(8_000), max_tokens=400)
    for row, num_tokens in enumerate(lengths):
        if num_tokens <= layout.max_tokens_that_fit and layout.can_place(num_tokens):
            layout.place(row, num_tokens)
            layout.set_num_tokens(row, num_tokens)
            layout.settle()
        assert layout.used_bytes <= layout.limit_bytes
