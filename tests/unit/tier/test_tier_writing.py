"""Files written in C, and without it."""

from __future__ import annotations

import errno
import fcntl
import os
import resource
import signal
import sys
from pathlib import Path
from random import Random

import pytest

from mlx_lm_server.native.memory import unwritten_bytes
from mlx_lm_server.tier import files as tier_files
from mlx_lm_server.tier.files import OsFiles, write_file
from mlx_lm_server.tier.native_files import files_library

NO_LIBRARY = files_library() is None
WAYS = [
    pytest.param("C", marks=pytest.mark.skipif(NO_LIBRARY, reason="nothing can be compiled here")),
    "Python",
]
# Of pieces, around what is written at a time and what a direct write wants.
SIZES = [(1,), (4095, 1), (4096,), (4097,), (300, 0, 5000), (1 << 20,), (1000, 1 << 20, 77)]
# What can be written from where it lies, if it begins at a sector, and what cannot be.
SECTORS = [(512,), (1024, 1 << 18), (512, 0, 512, 3 << 20), (1024, 1 << 18, 77), (512,) * 20]


@pytest.fixture(params=WAYS)
def files(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> OsFiles:
    if request.param == "Python":
        monkeypatch.setattr(tier_files, "files_library", lambda: None)
    return OsFiles()


def pieces_of(sizes: tuple[int, ...]) -> list[memoryview]:
    random = Random(7)
    return [memoryview(random.randbytes(size)) for size in sizes]


def at_sectors(pieces: list[memoryview]) -> list[memoryview]:
    copies = [unwritten_bytes(piece.nbytes) for piece in pieces]
    for copy, piece in zip(copies, pieces, strict=True):
        copy[:] = piece
    return copies


@pytest.mark.parametrize("sizes", [*SIZES, (3 << 20, 5, 3 << 20)])
def test_a_file_has_the_bytes_of_all_pieces(
    tmp_path: Path, files: OsFiles, sizes: tuple[int, ...]
) -> None:
    pieces, path = pieces_of(sizes), tmp_path / "file"
    write_file(files, path, pieces, durably=True)
    assert path.read_bytes() == b"".join(pieces)


@pytest.mark.parametrize("sizes", SECTORS)
@pytest.mark.parametrize("num_elsewhere", [0, 1, 2])
def test_pieces_at_sectors_are_written_from_where_they_lie(
    tmp_path: Path, files: OsFiles, sizes: tuple[int, ...], num_elsewhere: int
) -> None:
    pieces, path = pieces_of(sizes), tmp_path / "file"
    written = [*pieces[:num_elsewhere], *at_sectors(pieces[num_elsewhere:])]
    write_file(files, path, written)
    assert path.read_bytes() == b"".join(pieces)


@pytest.mark.skipif(NO_LIBRARY or sys.platform != "linux", reason="C on Linux does that")
def test_pieces_at_sectors_are_not_copied_before(tmp_path: Path) -> None:
    """Copied they would be written megabyte by megabyte."""
    files, pieces = OsFiles(), pieces_of((512, 3 << 20))
    fd = files.create(tmp_path / "file")
    if not fcntl.fcntl(fd, fcntl.F_GETFL) & tier_files.O_DIRECT:
        pytest.skip("the file system does not write directly")
    before = num_writes()
    files.write(fd, [pieces[0], *at_sectors(pieces[1:])])
    assert num_writes() == before + 1
    files.close(fd)


def num_writes() -> int:
    """System calls of this process that wrote."""
    facts = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(facts["syscw"])


def test_a_view_of_a_part_and_memory_that_may_be_written(tmp_path: Path, files: OsFiles) -> None:
    whole = bytearray(Random(1).randbytes(10_000))
    pieces = [memoryview(whole)[17:5000], memoryview(bytes(whole))[5001:]]
    write_file(files, tmp_path / "file", pieces)
    assert (tmp_path / "file").read_bytes() == bytes(whole[17:5000] + whole[5001:])


def test_a_file_goes_on_where_the_last_write_ended(tmp_path: Path, files: OsFiles) -> None:
    pieces, path = pieces_of((5000, 4096, 3)), tmp_path / "file"
    fd = files.create(path)
    for piece in pieces:
        assert files.write(fd, [piece]) == piece.nbytes
    files.close(fd)
    assert path.read_bytes() == b"".join(pieces)


@pytest.mark.parametrize("pieces", [pieces_of((20_000,)), at_sectors(pieces_of((512, 20_480)))])
def test_what_the_system_refuses_is_an_error(
    tmp_path: Path, files: OsFiles, pieces: list[memoryview]
) -> None:
    """A file may not grow beyond a limit of the process."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    old = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, hard))
    try:
        with pytest.raises(OSError, match=os.strerror(errno.EFBIG)):
            write_file(files, tmp_path / "file", pieces)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, old)


def test_a_closed_file_is_an_error(files: OsFiles) -> None:
    with pytest.raises(OSError, match=os.strerror(errno.EBADF)):
        files.write(-1, pieces_of((10,)))
