"""Files written in C, at once and while a core is idle, and without C."""

from __future__ import annotations

import errno
import os
import resource
import signal
from pathlib import Path
from random import Random

import pytest
from tier_fakes import (
    FakeClock,
    FaultFiles,
    make_chain,
    make_record,
    open_store,
    save_all,
    settings,
)

from mlx_lm_server.tier import files as tier_files
from mlx_lm_server.tier.files import OsFiles, write_file
from mlx_lm_server.tier.jobs import SaveJob
from mlx_lm_server.tier.mailbox import Mailbox
from mlx_lm_server.tier.native_files import files_library

NO_LIBRARY = files_library() is None
WAYS = [
    pytest.param("C", marks=pytest.mark.skipif(NO_LIBRARY, reason="nothing can be compiled here")),
    "Python",
]
# Of pieces, around what is written at a time and what a direct write wants.
SIZES = [(0,), (1,), (4095, 1), (4096,), (4097,), (300, 0, 5000), (1 << 20,), (1000, 1 << 20, 77)]


@pytest.fixture(params=WAYS)
def files(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> OsFiles:
    if request.param == "Python":
        monkeypatch.setattr(tier_files, "files_library", lambda: None)
    return OsFiles()


def pieces_of(sizes: tuple[int, ...]) -> list[memoryview]:
    random = Random(7)
    return [memoryview(random.randbytes(size)) for size in sizes]


@pytest.mark.parametrize("when_idle", [False, True])
@pytest.mark.parametrize("sizes", [*SIZES, (3 << 20, 5, 3 << 20)])
def test_a_file_has_the_bytes_of_all_pieces(
    tmp_path: Path, files: OsFiles, sizes: tuple[int, ...], when_idle: bool
) -> None:
    pieces, path = pieces_of(sizes), tmp_path / "file"
    if sum(sizes) == 0:
        return
    write_file(files, path, pieces, durably=True, when_idle=when_idle)
    assert path.read_bytes() == b"".join(pieces)


def test_a_view_of_a_part_and_memory_that_may_be_written(tmp_path: Path, files: OsFiles) -> None:
    whole = bytearray(Random(1).randbytes(10_000))
    pieces = [memoryview(whole)[17:5000], memoryview(bytes(whole))[5001:]]
    write_file(files, tmp_path / "file", pieces)
    assert (tmp_path / "file").read_bytes() == bytes(whole[17:5000] + whole[5001:])


def test_a_file_goes_on_where_the_last_write_ended(tmp_path: Path, files: OsFiles) -> None:
    pieces, path = pieces_of((5000, 4096, 3)), tmp_path / "file"
    fd = files.create(path)
    for piece in pieces:
        assert files.write(fd, [piece], when_idle=False) == piece.nbytes
    files.close(fd)
    assert path.read_bytes() == b"".join(pieces)


def test_what_the_system_refuses_is_an_error(tmp_path: Path, files: OsFiles) -> None:
    """A file may not grow beyond a limit of the process."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    old = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, hard))
    try:
        for when_idle in (False, True):
            with pytest.raises(OSError, match=os.strerror(errno.EFBIG)):
                write_file(
                    files, tmp_path / str(when_idle), pieces_of((20_000,)), when_idle=when_idle
                )
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, old)


def test_a_closed_file_is_an_error(files: OsFiles) -> None:
    with pytest.raises(OSError, match=os.strerror(errno.EBADF)):
        files.write(-1, pieces_of((10,)), when_idle=True)


def test_saves_wait_for_idle_cores_half_a_flush_interval(tmp_path: Path) -> None:
    clock = FakeClock()
    mailbox = Mailbox(settings(tmp_path, flush_interval_s=1.0), clock)
    jobs = [SaveJob(make_record(n), "", 1024) for n in range(4)]
    for job in jobs:
        mailbox.put(job)
    taken = [mailbox.take(0.0)]
    clock.pass_time(0.4)
    taken.append(mailbox.take(0.0))
    clock.pass_time(0.2)
    taken.append(mailbox.take(0.0))
    assert taken == jobs[:3]
    assert [job.when_idle for job in jobs[:3]] == [True, True, False]


def test_a_stop_waits_for_no_idle_core(tmp_path: Path) -> None:
    mailbox = Mailbox(settings(tmp_path, flush_interval_s=60.0), FakeClock())
    job = SaveJob(make_record(1), "", 1024)
    mailbox.put(job)
    mailbox.close()
    assert mailbox.take(0.0) is job
    assert not job.when_idle


def test_only_the_io_thread_waits_for_idle_cores(tmp_path: Path) -> None:
    for async_writes in (True, False):
        files = FaultFiles()
        folder = tmp_path / str(async_writes)
        store = open_store(folder, files, async_writes=async_writes, flush_interval_s=60.0)
        save_all(store, make_chain(1, 5))
        assert store.flush(10.0)
        assert (files.idle_writes > 0) == async_writes
        assert store.stats().counters.saves_persisted == 5
        store.close(5.0)
