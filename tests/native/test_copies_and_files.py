"""Copies, reads and writes in C end where they are told to, and senseless numbers are refused."""

from __future__ import annotations

import ctypes
import errno
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlx_lm_server.native.memory import PAGE_BYTES, address_of, unwritten_bytes
from mlx_lm_server.tier.native_files import files_library, write_pieces
from tests.native.door import needs_library, products

pytestmark = needs_library

LONG_MAX = 2**63 - 1
COPY_NAMES = ("arrays", "sources", "targets", "moves", "from", "to", "lengths", "heads")


def longs(*numbers: int) -> ctypes.Array[ctypes.c_long]:
    return (ctypes.c_long * len(numbers))(*numbers)


def copy_heads(asked: dict[str, Any], strides: tuple[int, int]) -> int:
    function, one, many = products().copy_heads, ctypes.c_long, ctypes.POINTER(ctypes.c_long)
    function.argtypes = one, many, many, one, many, many, many, one, one, one
    return int(function(*(asked[name] for name in COPY_NAMES), *strides))


@pytest.mark.parametrize("scale", [1, 20_000])
def test_runs_of_bytes_go_to_their_places(scale: int) -> None:
    """Few, and so many that threads share them."""
    heads, (wide, narrow) = 3, (11 * scale, 7 * scale)
    source = np.random.default_rng(0).integers(0, 256, (heads, wide), np.uint8)
    target = np.zeros((heads, narrow), np.uint8)
    moves = [(1 * scale, 0, 2 * scale), (10 * scale, 2 * scale, 1 * scale), (0, 3 * scale, 0)]
    asked = dict(
        zip(
            COPY_NAMES,
            (
                1,
                longs(source.ctypes.data),
                longs(target.ctypes.data),
                len(moves),
                *(longs(*column) for column in zip(*moves, strict=True)),
                heads,
            ),
            strict=True,
        )
    )
    assert copy_heads(asked, (wide, narrow))
    assert np.array_equal(target[:, : 2 * scale], source[:, scale : 3 * scale])
    assert np.array_equal(target[:, 2 * scale : 3 * scale], source[:, 10 * scale :])
    assert not target[:, 3 * scale :].any()


@pytest.mark.parametrize(
    "odd",
    [
        {"arrays": -1},
        {"moves": -1},
        {"heads": -1},
        {"heads": LONG_MAX},
        {"arrays": LONG_MAX, "moves": 2},
        {"lengths": longs(-1)},
        {"lengths": longs(LONG_MAX, 1), "moves": 2},
        *({name: None} for name in ("sources", "targets", "from", "to", "lengths")),
    ],
    ids=lambda odd: " ".join(odd),
)
def test_senseless_copies_are_refused(odd: dict[str, Any]) -> None:
    source, target = np.ones(8, np.uint8), np.zeros(8, np.uint8)
    places = longs(source.ctypes.data), longs(target.ctypes.data)
    counts = 1, *places, 1, longs(0), longs(0), longs(4), 1
    asked = dict(zip(COPY_NAMES, counts, strict=True))
    assert not copy_heads(asked | odd, (8, 8))
    assert not copy_heads(asked, (-8, 8))
    assert not copy_heads(asked, (8, -8))
    assert not target.any()


def library() -> ctypes.CDLL:
    found = files_library()
    assert found is not None
    return found


@pytest.mark.parametrize("num_threads", [0, 1, 4, 100])
def test_files_are_read_to_where_they_may(tmp_path: Path, num_threads: int) -> None:
    contents = [b"", b"x", bytes(PAGE_BYTES), os.urandom(3 * PAGE_BYTES + 5), os.urandom(10_000)]
    paths = [tmp_path / str(number) for number in range(len(contents) + 1)]
    for path, content in zip(paths, contents, strict=False):
        path.write_bytes(content)
    most = [10, 1, PAGE_BYTES, 5 * PAGE_BYTES, 4097, 10]
    into = [unwritten_bytes(-(-size // PAGE_BYTES) * PAGE_BYTES) for size in most]
    names = (ctypes.c_char_p * len(paths))(*map(os.fsencode, paths))
    places = (ctypes.c_void_p * len(paths))(*map(address_of, into))
    sizes = longs(*most)  # like all arrays it is read until the end
    reading = library().begin_reading(len(paths), names, places, sizes, num_threads)
    results = [library().result_of(reading, number) for number in range(len(paths))]
    outside = [library().result_of(reading, number) for number in (-1, len(paths), 2**31 - 1)]
    library().end_reading(reading)
    assert results == [0, 1, PAGE_BYTES, 3 * PAGE_BYTES + 5, 4097, -errno.ENOENT]
    assert outside == [-errno.EINVAL] * 3
    for content, room, result in zip(contents, into, results, strict=False):
        assert room[:result] == content[:result]


@pytest.mark.parametrize("max_bytes", [-1, -LONG_MAX - 1, LONG_MAX])
def test_a_file_of_no_such_size_is_an_error(tmp_path: Path, max_bytes: int) -> None:
    (tmp_path / "file").write_bytes(bytes(10))
    names = (ctypes.c_char_p * 2)(os.fsencode(tmp_path / "file"), None)
    room = unwritten_bytes(PAGE_BYTES)
    places = (ctypes.c_void_p * 2)(address_of(room), address_of(room))
    sizes = longs(max_bytes, 10)
    reading = library().begin_reading(2, names, places, sizes, 1)
    assert [library().result_of(reading, number) for number in (0, 1)] == [-errno.EINVAL] * 2
    library().end_reading(reading)


def test_senseless_readings_are_refused() -> None:
    names, places = (ctypes.c_char_p * 1)(), (ctypes.c_void_p * 1)()
    arrays = names, places, longs(1)
    assert not library().begin_reading(-1, *arrays, 1)
    assert not library().begin_reading(-(2**31), *arrays, 1)
    for missing in range(3):
        odd = [None if number == missing else array for number, array in enumerate(arrays)]
        assert not library().begin_reading(1, *odd, 1)
    assert library().result_of(None, 0) == -errno.EINVAL
    library().end_reading(None)


@pytest.mark.parametrize("sizes", [(), (0,), (1, 0, 4095), (512, 4096), (1 << 20, 3), (512,) * 20])
@pytest.mark.parametrize("flags", [0, getattr(os, "O_DIRECT", 0)])
def test_pieces_are_written_to_their_end(
    tmp_path: Path, sizes: tuple[int, ...], flags: int
) -> None:
    pieces = [memoryview(np.random.default_rng(size).bytes(size)) for size in sizes]
    try:
        fd = os.open(tmp_path / "file", os.O_CREAT | os.O_WRONLY | flags)
    except OSError:
        pytest.skip("the file system does not write directly")
    assert write_pieces(library(), fd, pieces) == sum(sizes)
    os.close(fd)
    assert (tmp_path / "file").read_bytes() == b"".join(pieces)


@pytest.mark.parametrize(
    ("sizes", "num_pieces"),
    [
        ((4, -1), 2),
        ((-LONG_MAX - 1, 4), 2),
        ((LONG_MAX, 4), 2),
        ((LONG_MAX, LONG_MAX), 2),
        ((4, 4), -1),
        (None, 2),
    ],
)
def test_senseless_pieces_are_refused(
    tmp_path: Path, sizes: tuple[int, ...] | None, num_pieces: int
) -> None:
    piece = b"abcd"
    pieces = (ctypes.c_char_p * 2)(piece, piece)
    fd = os.open(tmp_path / "file", os.O_CREAT | os.O_WRONLY)
    lengths = None if sizes is None else longs(*sizes)
    assert library().write_pieces(fd, pieces, lengths, num_pieces) == -errno.EINVAL
    assert library().write_pieces(fd, None, longs(4), 1) == -errno.EINVAL
    assert library().write_pieces(fd, (ctypes.c_char_p * 1)(), longs(4), 1) == -errno.EINVAL
    os.close(fd)
    assert (tmp_path / "file").read_bytes() == b""
