"""Whole files, several at a time: in C, and in threads where nothing can be compiled."""

from __future__ import annotations

import errno
import os
import sys
import threading
import time
from pathlib import Path

import pytest
from tier_fakes import make_chain, open_store, save_all, wait_until, wanted

from mlx_lm_server.tier import reading
from mlx_lm_server.tier.files import OsFiles

NO_LIBRARY = reading.files_library() is None
WAYS = [
    pytest.param("C", marks=pytest.mark.skipif(NO_LIBRARY, reason="nothing can be compiled here")),
    "threads",
]


@pytest.fixture(params=WAYS, autouse=True)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "threads":
        monkeypatch.setattr(reading, "files_library", lambda: None)
    return str(request.param)


@pytest.mark.parametrize("num_bytes", [0, 1, 511, 512, 4095, 4096, 4097, 20_000, 10_000_000])
def test_a_file_is_read_whole_or_as_far_as_is_asked(tmp_path: Path, num_bytes: int) -> None:
    path = tmp_path / "file"
    contents = os.urandom(num_bytes)
    path.write_bytes(contents)
    limits = [num_bytes + 1, num_bytes, num_bytes // 2, 10]
    found = list(OsFiles().read_files([path] * 4, limits))
    assert found == [contents[:limit] for limit in limits]


def test_what_cannot_be_read_is_an_error_in_its_place(tmp_path: Path) -> None:
    good, missing, folder = tmp_path / "good", tmp_path / "missing", tmp_path / "folder"
    good.write_bytes(b"12345")
    folder.mkdir()
    found = list(OsFiles().read_files([good, missing, folder, good], [6] * 4))
    assert found[0] == found[3] == b"12345"
    errors = [each.errno for each in found if isinstance(each, OSError)]
    assert errors == [errno.ENOENT, errno.EISDIR]


def test_no_files_are_no_contents() -> None:
    assert list(OsFiles().read_files([], [])) == []


def test_many_files_come_in_their_order(tmp_path: Path) -> None:
    paths = [tmp_path / str(n) for n in range(200)]
    for n, path in enumerate(paths):
        path.write_bytes(str(n).encode() * 1000)
    found = OsFiles().read_files(paths, [9000] * 200)
    assert list(found) == [str(n).encode() * 1000 for n in range(200)]


@pytest.mark.skipif(sys.platform != "linux", reason="no such files here")
def test_a_file_system_without_direct_reads_is_read_as_usual() -> None:
    path = Path("/proc/version")
    (found,) = OsFiles().read_files([path], [10_000])
    assert found == path.read_bytes()


def test_files_are_read_several_at_a_time(tmp_path: Path) -> None:
    """Pipes, whose opening waits for a writer: the last finds a reader before the first is
    opened."""
    paths = [tmp_path / str(n) for n in range(reading.FILES_AT_A_TIME)]
    for path in paths:
        os.mkfifo(path)
    ended = threading.Event()

    def read() -> None:
        list(OsFiles().read_files(paths, [10] * len(paths)))
        ended.set()

    threading.Thread(target=read, daemon=True).start()
    wait_until(lambda: _has_reader(paths[-1]))
    while not ended.wait(0.01):
        for path in paths:
            _has_reader(path)


def _has_reader(pipe: Path) -> bool:
    """Whether somebody reads it or waits for a writer, who then has come and gone."""
    try:
        os.close(os.open(pipe, os.O_WRONLY | os.O_NONBLOCK))
    except OSError:
        return False
    return True


def test_who_stops_early_reads_no_more(tmp_path: Path) -> None:
    """One file, then pipes that hold all threads: none of them comes to the last pipe."""
    paths = [tmp_path / f"{n}" for n in range(10)]
    paths[0].write_bytes(b"x")
    for pipe in paths[1:]:
        os.mkfifo(pipe)
    found = OsFiles().read_files(paths, [2] * 10)
    assert next(found) == b"x"
    held = paths[1 : 1 + reading.FILES_AT_A_TIME]
    ended = threading.Event()

    def stop() -> None:
        found.close()
        ended.set()

    threading.Thread(target=stop, daemon=True).start()
    time.sleep(0.05)  # before the pipes let anybody go on
    wait_until(lambda: not any(_has_reader(pipe) for pipe in held) and ended.is_set())
    time.sleep(0.05)
    assert not any(_has_reader(pipe) for pipe in paths[1 + reading.FILES_AT_A_TIME :])


def test_contents_stay_while_somebody_has_them(tmp_path: Path) -> None:
    """What is read later may use memory again, but only that of contents that nobody has."""
    files, kept = OsFiles(), []
    for n in range(20):
        path = tmp_path / f"{n}"
        path.write_bytes(bytes([n]) * 5000)
        first, second = files.read_files([path] * 2, [5001] * 2)
        assert first == second
        kept.append(first[100:] if n % 3 == 0 else None)
    assert kept[::3] == [bytes([n]) * 4900 for n in range(0, 20, 3)]


def test_nobody_writes_to_contents(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"y")
    (found,) = OsFiles().read_files([path], [2])
    with pytest.raises(TypeError):
        found[0] = 1


def test_a_chain_comes_back(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    chain = make_chain(1, 30, nbytes=10_000)
    save_all(store, chain)
    assert store.flush(5.0)
    store.prefetch(wanted(chain), "r")
    read = []
    wait_until(lambda: bool(read.extend(store.poll()) or read))
    assert [record.name for record in read[0].records] == [record.name for record in chain]
    store.close(5.0)
