"""Compressed bodies come out as they went in, and never larger than they may be."""

from __future__ import annotations

import gzip
import tracemalloc
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_lm_server.errors import InvalidRequestError, RequestTooLargeError
from mlx_lm_server.server.http.content_coding import MAX_MEMBERS, inflate

LIMIT = 10**6


def bare(data: bytes) -> bytes:
    """Deflate without zlib's wrapper."""
    packer = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    return packer.compress(data) + packer.flush()


@given(st.binary(max_size=3000), st.integers(1, 400))
def test_what_was_compressed_comes_back(data: bytes, times: int) -> None:
    data *= times
    assert inflate(gzip.compress(data, mtime=0), "gzip", 2 * LIMIT) == data
    assert inflate(gzip.compress(data, mtime=0), "x-gzip", 2 * LIMIT) == data
    assert inflate(zlib.compress(data), "deflate", 2 * LIMIT) == data
    assert inflate(bare(data), "deflate", 2 * LIMIT) == data


def test_members_are_read_one_after_the_other() -> None:
    members = [bytes([i]) * 30_000 for i in range(9)]
    assert inflate(b"".join(map(gzip.compress, members)), "gzip", LIMIT) == b"".join(members)


def test_nothing_is_nothing() -> None:
    assert inflate(b"", "gzip", LIMIT) == b""
    assert inflate(gzip.compress(b"", mtime=0), "gzip", LIMIT) == b""


@pytest.mark.parametrize("cut", [1, 5, 10, 15, -8, -1])
def test_what_is_cut_off_is_refused(cut: int) -> None:
    with pytest.raises(InvalidRequestError, match="cut off"):
        inflate(gzip.compress(b"x" * 1000, mtime=0)[:cut], "gzip", LIMIT)


@pytest.mark.parametrize(
    ("data", "coding"),
    [
        (b"{}", "gzip"),
        (b"\x1f\x8b\x08" + b"x" * 50, "gzip"),
        (gzip.compress(b"{}", mtime=0) + b"more", "gzip"),
        (gzip.compress(b"x" * 100, mtime=0)[:-8] + bytes(8), "gzip"),  # a wrong checksum
        (gzip.compress(b"{}", mtime=0), "deflate"),
        (b"\xff\xff\xff", "deflate"),
    ],
    ids=["plain", "head only", "more behind", "wrong checksum", "gzip for deflate", "nonsense"],
)
def test_what_is_damaged_is_refused(data: bytes, coding: str) -> None:
    with pytest.raises(InvalidRequestError, match=f"no {coding}"):
        inflate(data, coding, LIMIT)


def test_the_limit_is_of_what_comes_out() -> None:
    assert len(inflate(gzip.compress(b"x" * LIMIT, mtime=0), "gzip", LIMIT)) == LIMIT
    for data in (
        gzip.compress(b"x" * (LIMIT + 1), mtime=0),
        gzip.compress(b"x" * LIMIT, mtime=0) * 2,
    ):
        with pytest.raises(RequestTooLargeError, match=str(LIMIT)):
            inflate(data, "gzip", LIMIT)


def test_a_bomb_takes_no_more_memory_than_the_limit() -> None:
    bomb = gzip.compress(bytes(300 * 2**20), 9, mtime=0)
    tracemalloc.start()
    with pytest.raises(RequestTooLargeError):
        inflate(bomb, "gzip", LIMIT)
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak_bytes < 3 * LIMIT


def test_members_without_end_are_refused() -> None:
    with pytest.raises(InvalidRequestError, match=str(MAX_MEMBERS)):
        inflate(gzip.compress(b"", mtime=0) * (MAX_MEMBERS + 1), "gzip", LIMIT)
