from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_lm_server.protocol import (
    MAX_FRAME_BYTES,
    Abort,
    FrameBuffer,
    FrameError,
    decode_to_engine,
    encode_frame,
)


@given(st.lists(st.text(max_size=20), max_size=8), st.lists(st.integers(1, 9), min_size=1))
def test_frames_survive_any_cut(ids: list[str], sizes: list[int]) -> None:
    data = b"".join(encode_frame(Abort(req_id)) for req_id in ids)
    frames, found, at = FrameBuffer(), [], 0
    while at < len(data):
        size = sizes[len(found) % len(sizes)]
        found += frames.feed(data[at : at + size])
        at += size
    assert [decode_to_engine(body) for body in found] == [Abort(req_id) for req_id in ids]


def test_an_impossible_length_is_an_error() -> None:
    with pytest.raises(FrameError):
        FrameBuffer().feed((MAX_FRAME_BYTES + 1).to_bytes(4, "little"))
