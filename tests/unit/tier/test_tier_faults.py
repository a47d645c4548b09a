"""Every call to the file system fails in every way that is its own: the outcome is always a
shorter prefix, a counter, and a tier that works again once the disk does."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import sqlite3
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tier_fakes import (
    NAMESPACE,
    FakeClock,
    FaultFiles,
    files_in,
    load,
    make_chain,
    make_record,
    open_store,
    remains_in,
    save_all,
    settled,
    wait_until,
)

from mlx_lm_server.tier import Record, SsdStore
from mlx_lm_server.tier.files import Files
from mlx_lm_server.tier.native_files import files_library

Fault = Callable[[FaultFiles, Path], None]
LONG_S = 600.0


def error(call: str, number: int) -> Fault:
    return lambda files, _folder: files.fail(call, number)


def write_as_usual(fd: int) -> None:
    """Any number of bytes, which a direct write may not."""
    flags = fcntl.fcntl(fd, fcntl.F_GETFL)
    fcntl.fcntl(fd, fcntl.F_SETFL, flags & ~getattr(os, "O_DIRECT", 0))


def short_writes(files: FaultFiles, _folder: Path) -> None:
    """The kernel takes seven bytes at a time."""

    def write(fd: int, pieces: list[memoryview]) -> int:
        write_as_usual(fd)
        return os.write(fd, bytes(pieces[0][:7]))

    files.instead["write"] = write


def torn_writes(files: FaultFiles, _folder: Path) -> None:
    """The kernel says all was written, and half was."""

    def write(fd: int, pieces: list[memoryview]) -> int:
        write_as_usual(fd)
        whole = b"".join(pieces)
        os.write(fd, whole[: len(whole) // 2])
        return len(whole)

    files.instead["write"] = write


def no_byte_taken(files: FaultFiles, _folder: Path) -> None:
    files.instead["write"] = lambda _fd, _pieces: 0


def flipped_bits(files: FaultFiles, _folder: Path) -> None:
    def read(fd: int, max_bytes: int) -> bytes:
        contents = bytearray(os.read(fd, max_bytes))
        if contents:
            contents[len(contents) // 2] ^= 4
        return bytes(contents)

    files.instead["read"] = read


def short_reads(files: FaultFiles, _folder: Path) -> None:
    files.instead["read"] = lambda fd, max_bytes: os.read(fd, min(max_bytes, 100))


def half_files(files: FaultFiles, _folder: Path) -> None:
    files.instead["read"] = lambda fd, max_bytes: (
        b"" if os.lseek(fd, 0, os.SEEK_CUR) else os.read(fd, 300)
    )


def flipped_bits_in_files(files: FaultFiles, _folder: Path) -> None:
    def flipped(contents: memoryview) -> memoryview:
        copy = bytearray(contents)
        copy[len(copy) // 2] ^= 4
        return memoryview(copy)

    files.instead["read_files"] = flipped


def torn_files(files: FaultFiles, _folder: Path) -> None:
    files.instead["read_files"] = lambda contents: contents[:300]


def longer_files(files: FaultFiles, _folder: Path) -> None:
    files.instead["read_files"] = lambda contents: memoryview(bytes(contents) + b" ")


def empty_files(files: FaultFiles, _folder: Path) -> None:
    files.instead["read_files"] = lambda contents: contents[:0]


def deleted_before(call: str) -> Fault:
    """Somebody deletes the whole cache folder each time before this call."""

    def fault(files: FaultFiles, folder: Path) -> None:
        files.before[call] = lambda *_args: shutil.rmtree(folder, ignore_errors=True)

    return fault


def slow(call: str) -> Fault:
    def fault(files: FaultFiles, _folder: Path) -> None:
        files.before[call] = lambda *_args: time.sleep(0.002)

    return fault


def lying_facts(files: FaultFiles, _folder: Path) -> None:
    files.fail("facts", errno.ENOENT)


def no_space_left(files: FaultFiles, _folder: Path) -> None:
    files.instead["free_bytes"] = lambda _path: 0


def errors(call: str, *numbers: int) -> dict[str, Fault]:
    return {errno.errorcode[number]: error(call, number) for number in numbers}


FAULTS: dict[str, dict[str, Fault]] = {
    "create": {
        **errors("create", errno.ENOSPC, errno.EIO, errno.EACCES, errno.EMFILE, errno.EROFS),
        "folder deleted": deleted_before("create"),
    },
    "open": {
        **errors("open", errno.EIO, errno.EACCES, errno.ENOENT, errno.EMFILE),
        "folder deleted": deleted_before("open"),
    },
    "write": {
        **errors("write", errno.ENOSPC, errno.EIO, errno.EDQUOT),
        "short": short_writes,
        "torn": torn_writes,
        "nothing": no_byte_taken,
        "slow": slow("write"),
        "folder deleted": deleted_before("write"),
    },
    "read": {
        **errors("read", errno.EIO),
        "flipped bit": flipped_bits,
        "short": short_reads,
        "torn": half_files,
        "slow": slow("read"),
    },
    "read_files": {
        **errors("read_files", errno.EIO, errno.EACCES, errno.ENOENT, errno.EMFILE),
        "flipped bit": flipped_bits_in_files,
        "torn": torn_files,
        "longer": longer_files,
        "empty": empty_files,
        "slow": slow("read_files"),
        "folder deleted": deleted_before("read_files"),
    },
    "fsync": {**errors("fsync", errno.EIO, errno.ENOSPC), "slow": slow("fsync")},
    "close": errors("close", errno.EIO, errno.ENOSPC),
    "rename": {
        **errors("rename", errno.ENOSPC, errno.EIO, errno.EACCES),
        "folder deleted": deleted_before("rename"),
    },
    "unlink": errors("unlink", errno.EIO, errno.EACCES, errno.EBUSY),
    "make_folder": errors("make_folder", errno.ENOSPC, errno.EIO, errno.EACCES, errno.EROFS),
    "sync_folder": {
        **errors("sync_folder", errno.EIO),
        "folder deleted": deleted_before("sync_folder"),
    },
    "list_folder": errors("list_folder", errno.EIO, errno.EACCES, errno.ENOENT),
    "facts": {**errors("facts", errno.EIO, errno.EACCES), "says deleted": lying_facts},
    "free_bytes": {**errors("free_bytes", errno.EIO), "nothing free": no_space_left},
}
CASES = [
    pytest.param(call, fault, id=f"{call}-{name}")
    for call, faults in FAULTS.items()
    for name, fault in faults.items()
]
MODES = [
    pytest.param({"async_writes": False}, id="inline"),
    pytest.param({"async_writes": False, "durability": "persistent"}, id="persistent"),
]


def test_every_call_has_fault_cases() -> None:
    calls = {name for name in vars(Files) if not name.startswith("_")}
    assert calls == set(FAULTS)


def put_without_rows(folder: Path, chain: list[Record]) -> None:
    """As a server leaves them that is killed before its commit."""
    other = folder.with_name("other")
    store = open_store(other, async_writes=False)
    save_all(store, chain)
    assert store.close(1.0)
    for path in files_in(other):
        shutil.copy(path, folder / path.relative_to(other))


def use_it(store: SsdStore, chains: list[list[Record]]) -> None:
    """Save, read, evict, tidy: `load` fails on a wrong byte."""
    for chain in chains:
        for record in chain:
            if store.begin_save(record.nbytes):
                store.save(record, "req")
        store.use([chain[-1].name])
        load(store, chain)
    for _ in range(50):
        store.poll()
    store.flush(5.0)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("call", "fault"), CASES)
def test_a_fault_is_a_shorter_prefix_and_it_works_again_after(
    tmp_path: Path, mode: dict[str, Any], call: str, fault: Fault
) -> None:
    folder, clock = tmp_path / "cache", FakeClock()
    given = {**mode, "max_size_bytes": 30_000, "clock": clock}
    healthy = open_store(folder, **given)
    save_all(healthy, make_chain(900, 5))
    assert healthy.close(1.0)
    put_without_rows(folder, make_chain(950, 3))

    files = FaultFiles()
    fault(files, folder)
    store = open_store(folder, files, **given)  # the fault is there from the start
    use_it(store, [make_chain(900, 5), make_chain(1, 12)])
    files.heal()
    clock.pass_time(LONG_S)
    use_it(store, [make_chain(20, 4)])
    fault(files, folder)  # and comes in the middle
    use_it(store, [make_chain(20, 4), make_chain(30, 12)])

    files.heal()
    clock.pass_time(LONG_S)
    settled(store)
    clock.pass_time(LONG_S)
    settled(store)
    for record in [
        *make_chain(900, 5),
        *make_chain(1, 12),
        *make_chain(20, 4),
        *make_chain(30, 12),
    ]:
        load(store, [record])  # what the disk lied about is found when it is read
    fresh = make_chain(70, 5)
    save_all(store, fresh)
    assert len(load(store, fresh)) == 5, "the tier works again"
    assert_agreement(store, folder)
    assert store.close(1.0)
    assert files.calls[call] > 0 or call in ("fsync", "sync_folder")


def assert_agreement(store: SsdStore, folder: Path) -> None:
    settled(store)
    sizes = {path.name[:64]: path.stat().st_size for path in files_in(folder)}
    with closing(sqlite3.connect(folder / "index-1.sqlite")) as db:
        rows = db.execute("SELECT lower(hex(name)), size FROM records").fetchall()
    assert len(rows) == len(dict(rows))
    assert {name: size for name, size in rows if name in sizes} == sizes, "every file has its row"
    assert store.stats().used_bytes == sum(size for _, size in rows)
    assert remains_in(folder) == []
    assert sum(sizes.values()) <= store.stats().limit_bytes


# The full disk


def test_a_full_disk_evicts_measures_again_and_goes_on(tmp_path: Path) -> None:
    """A disk of 12 records: the limit from the flag is far away, the disk's end is near."""
    files = FaultFiles()

    def full_at_twelve(_path: Path) -> None:
        if len(files_in(tmp_path)) >= 12:
            raise OSError(errno.ENOSPC, "injected")

    files.before["create"] = full_at_twelve
    files.instead["free_bytes"] = lambda _path: 0 if len(files_in(tmp_path)) >= 12 else 1 << 40
    store = open_store(tmp_path, files, async_writes=False)
    records = [make_record(n) for n in range(40)]
    save_all(store, records)
    counters = store.stats().counters
    assert counters.enospc > 0
    assert counters.saves_persisted == 40, "each full disk was ridden over by evictions"
    assert len(load(store, records[-3:])) == 3
    store.close(1.0)


@pytest.mark.skipif(not hasattr(os, "O_DIRECT"), reason="no such flag here")
def test_a_file_system_that_knows_no_flags_is_written_to_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, real_open = [], os.open

    def make_and_refuse(path: Any, flags: int, *mode: int) -> int:
        if flags & os.O_DIRECT:
            asked.append(path)
            os.close(real_open(path, flags & ~os.O_DIRECT, *mode))
            raise OSError(errno.EINVAL, "injected")
        return real_open(path, flags, *mode)

    monkeypatch.setattr(os, "open", make_and_refuse)
    store = open_store(tmp_path, async_writes=False)
    records = make_chain(1, 3)
    save_all(store, records)
    assert len(load(store, records)) == 3
    assert len(asked) == (files_library() is not None), "asked once, not for every record"
    store.close(1.0)


def test_a_disk_that_stays_full_is_left_alone_for_a_while(tmp_path: Path) -> None:
    files, clock = FaultFiles(), FakeClock()
    store = open_store(tmp_path, files, async_writes=False, clock=clock)
    files.fail("write", errno.ENOSPC)
    assert store.begin_save(1)
    store.save(make_record(1))
    store.poll()
    assert not store.begin_save(1), "no bytes are extracted for a full disk"
    assert store.stats().is_paused
    assert store.stats().counters.write_drops == 1
    clock.pass_time(1.5)
    assert store.begin_save(1)
    store.close(1.0)


def test_failures_in_a_row_pause_longer_and_longer(tmp_path: Path) -> None:
    files, clock = FaultFiles(), FakeClock()
    store = open_store(tmp_path, files, async_writes=False, clock=clock)
    files.fail("write", errno.EIO)
    pauses = []
    for n in range(10):
        store.save(make_record(n))
        store.poll()
        pause_s = 0
        while not store.room_for(1):
            clock.pass_time(1.0)
            pause_s += 1
        pauses.append(pause_s)
    assert pauses == [0, 0, 1, 2, 4, 8, 16, 32, 60, 60]
    store.close(1.0)


def test_failures_between_successes_pause_nothing(tmp_path: Path) -> None:
    files = FaultFiles()
    store = open_store(tmp_path, files, async_writes=False, clock=FakeClock())
    for n in range(9):
        if n % 3 == 0:
            files.fail("write", errno.EIO, times=2)
        store.save(make_record(n))
        store.poll()
        assert not store.stats().is_paused
    assert store.stats().counters.save_errors == 6
    store.close(1.0)


def test_persistent_retries_and_best_effort_does_not(tmp_path: Path) -> None:
    for durability, expected in [("persistent", (1, 2)), ("best_effort", (0, 0))]:
        files = FaultFiles()
        store = open_store(tmp_path / durability, files, async_writes=False, durability=durability)
        files.fail("write", errno.EIO, times=2)
        save_all(store, [make_record(1)])
        counters = store.stats().counters
        assert (counters.saves_persisted, counters.save_retries) == expected
        store.close(1.0)


def test_persistent_means_on_the_medium_before_it_is_counted(tmp_path: Path) -> None:
    files = FaultFiles()
    store = open_store(
        tmp_path, files, async_writes=False, durability="persistent", flush_interval_s=1e9
    )
    store.save(make_record(1))
    assert files.calls["fsync"] == 1
    assert store.stats().counters.saves_persisted == 0
    assert store.flush(1.0)
    assert files.calls["sync_folder"] == 1
    assert store.stats().counters.saves_persisted == 1
    store.close(1.0)


def test_best_effort_waits_for_no_medium(tmp_path: Path) -> None:
    files = FaultFiles()
    store = open_store(tmp_path, files, async_writes=False)
    save_all(store, make_chain(1, 5))
    assert files.calls["fsync"] == files.calls["sync_folder"] == 0
    store.close(1.0)


def test_a_slow_disk_costs_the_engine_no_time(tmp_path: Path) -> None:
    files = FaultFiles()
    files.before["write"] = lambda *_args: time.sleep(0.05)
    store = open_store(tmp_path, files)
    started_s, longest_s = time.monotonic(), 0.0
    for record in make_chain(1, 20):
        before_s = time.monotonic()
        if store.begin_save(record.nbytes):
            store.save(record)
        store.poll()
        longest_s = max(longest_s, time.monotonic() - before_s)
    assert time.monotonic() - started_s < 0.9, "20 writes took a second, none of it here"
    store.reset()
    store.close(5.0)


# Files under us


def damage(path: Path, how: str) -> None:
    contents = bytearray(path.read_bytes())
    if how == "flipped":
        contents[-9] ^= 1
        path.write_bytes(contents)
    elif how == "torn":
        path.write_bytes(contents[: len(contents) // 2])
    elif how == "longer":
        path.write_bytes(contents + b"\0")
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "deleted":
        path.unlink()
    elif how == "folder":
        path.unlink()
        path.mkdir()
    elif how == "swapped":
        other = next(each for each in files_in(path.parents[2]) if each != path)
        path.write_bytes(other.read_bytes())


@pytest.mark.parametrize(
    "how", ["flipped", "torn", "longer", "empty", "deleted", "folder", "swapped"]
)
def test_a_damaged_file_is_a_miss_once_and_is_written_again(tmp_path: Path, how: str) -> None:
    store = open_store(tmp_path, async_writes=False)
    chain = make_chain(1, 4)
    save_all(store, chain)
    path = next(each for each in files_in(tmp_path) if chain[2].name.hex() in each.name)
    damage(path, how)
    assert len(load(store, chain)) == 2
    assert not store.has(chain[2].name), "it is forgotten"
    counters = store.stats().counters
    assert counters.corrupt + counters.vanished + counters.load_errors == 1
    if how == "folder":
        path.rmdir()
    save_all(store, [chain[2]])
    assert len(load(store, chain)) == 4
    assert_agreement(store, tmp_path)
    store.close(1.0)


def test_another_version_of_a_record_than_the_index_knows_is_a_miss(tmp_path: Path) -> None:
    store = open_store(tmp_path / "cache", async_writes=False)
    record = make_record(1)
    save_all(store, [record])
    other = open_store(tmp_path / "other", async_writes=False)
    save_all(other, [replace(record, tensors=make_record(2).tensors)])
    other.close(1.0)
    [path], [other_path] = files_in(tmp_path / "cache"), files_in(tmp_path / "other")
    shutil.copy(other_path, path)
    assert load(store, [record]) == []
    assert store.stats().counters.corrupt == 1
    store.close(1.0)


def test_a_record_stays_where_the_process_had_no_file_handle_left_to_read_it(
    tmp_path: Path,
) -> None:
    files = FaultFiles()
    store = open_store(tmp_path, files, async_writes=False)
    record = make_record(1)
    save_all(store, [record])
    files.fail("read_files", errno.EMFILE, times=1)
    assert load(store, [record]) == []
    assert len(load(store, [record])) == 1
    store.close(1.0)


def test_the_folder_may_go_at_any_time(tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    store = open_store(folder)
    chain = make_chain(1, 5)
    save_all(store, chain)
    shutil.rmtree(folder)
    assert load(store, chain) == []
    again = make_chain(50, 5)
    save_all(store, again)
    assert len(load(store, again)) == 5
    assert store.close(5.0)


def test_a_folder_that_cannot_be_made_is_a_tier_without_records(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    clock = FakeClock()
    store = open_store(tmp_path / "file" / "cache", async_writes=False, clock=clock)
    store.save(make_record(1))
    store.poll()
    assert load(store, [make_record(1)]) == []
    assert not store.is_open
    assert not store.begin_save(10), "nothing is extracted for it"
    (tmp_path / "file").unlink()
    clock.pass_time(60.0)
    store.poll()
    save_all(store, [make_record(1)])
    assert len(load(store, [make_record(1)])) == 1
    store.close(1.0)


def test_what_is_not_ours_stays(tmp_path: Path) -> None:
    store = open_store(tmp_path, async_writes=False)
    save_all(store, [make_record(1)])
    own = tmp_path / NAMESPACE.folder
    strangers = [tmp_path / "notes.txt", own / "notes.txt", files_in(tmp_path)[0].parent / "a.txt"]
    for path in strangers:
        path.write_text("mine")
    store.close(1.0)
    store = open_store(tmp_path, async_writes=False)
    settled(store)
    assert all(path.exists() for path in strangers)
    store.close(1.0)


# The index under us


def lose(index: Path, how: str) -> None:
    for path in index.parent.glob("index-1.sqlite-*"):
        path.unlink()
    if how == "deleted":
        index.unlink()
    elif how == "garbage":
        index.write_bytes(os.urandom(10_000))
    elif how == "torn":
        index.write_bytes(index.read_bytes()[:1500])
    elif how == "flipped pages":
        contents = bytearray(index.read_bytes())
        contents[1024:] = os.urandom(len(contents) - 1024)
        index.write_bytes(contents)


@pytest.mark.parametrize("how", ["deleted", "garbage", "torn", "flipped pages"])
@pytest.mark.parametrize("is_running", [False, True])
def test_a_lost_index_is_built_anew_from_the_files(
    tmp_path: Path, how: str, is_running: bool
) -> None:
    clock = FakeClock()
    store = open_store(tmp_path, async_writes=False, clock=clock)
    other_chain, chain = make_chain(500, 5), make_chain(1, 40)
    other = open_store(
        tmp_path, async_writes=False, clock=clock, namespace=type(NAMESPACE)(b"\2" * 32)
    )
    save_all(other, other_chain)
    other.close(1.0)
    save_all(store, chain)
    if not is_running:
        store.close(1.0)
    lose(tmp_path / "index-1.sqlite", how)
    if not is_running:
        store = open_store(tmp_path, async_writes=False, clock=clock)
    for _ in range(4):
        settled(store)
        clock.pass_time(60.0)
    assert len(load(store, chain)) == 40
    if is_running and how != "deleted":  # sqlite reads a file that it has open from its own memory
        store.close(1.0)
        store = open_store(tmp_path, async_writes=False, clock=clock)
        settled(store)
        assert len(load(store, chain)) == 40
    assert store.stats().counters.corrupt == 0
    assert_agreement(store, tmp_path)
    with closing(sqlite3.connect(tmp_path / "index-1.sqlite")) as db:
        assert db.execute("SELECT COUNT(*) FROM records").fetchone() == (45,)
    store.close(1.0)


def test_a_torn_file_is_not_taken_into_an_index_that_is_built_anew(tmp_path: Path) -> None:
    store = open_store(tmp_path, async_writes=False)
    whole, torn = make_record(1), make_record(2)
    save_all(store, [whole, torn])
    store.close(1.0)
    (path,) = (each for each in files_in(tmp_path) if torn.name.hex() in each.name)
    path.write_bytes(path.read_bytes()[:-1])
    lose(tmp_path / "index-1.sqlite", "deleted")
    store = open_store(tmp_path, async_writes=False)
    settled(store)
    assert store.has(whole.name)
    assert not store.has(torn.name)
    assert store.stats().counters.files_removed == 1
    store.close(1.0)


def test_a_locked_index_delays_nothing_but_its_rows(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    with closing(sqlite3.connect(tmp_path / "index-1.sqlite", isolation_level=None)) as locker:
        locker.execute("BEGIN EXCLUSIVE")
        chain = make_chain(1, 5)
        for record in chain:
            assert store.begin_save(record.nbytes)
            store.save(record)
        assert len(load(store, chain)) == 5
        wait_until(lambda: store.stats().counters.index_errors > 0)
        locker.execute("ROLLBACK")
    assert store.close(5.0)
    again = open_store(tmp_path)
    assert len(load(again, chain)) == 5
    again.close(5.0)


# Two servers


def test_two_servers_on_one_folder_share_what_they_save(tmp_path: Path) -> None:
    one, two = open_store(tmp_path), open_store(tmp_path)
    chain = make_chain(1, 10)
    save_all(one, chain)
    wait_until(lambda: not two.poll() and all(two.has(record.name) for record in chain))
    assert len(load(two, chain)) == 10
    one.close(5.0)
    save_all(two, make_chain(50, 5))
    two.close(5.0)


def test_two_servers_keep_one_limit(tmp_path: Path) -> None:
    given = {"async_writes": False, "max_size_bytes": 30_000}
    one, two = open_store(tmp_path, **given), open_store(tmp_path, **given)
    for n in range(60):
        save_all(one if n % 2 else two, [make_record(n)])
    total = sum(path.stat().st_size for path in files_in(tmp_path))
    assert total <= 30_000
    for store in (one, two):
        assert_agreement(store, tmp_path)
        load(store, [make_record(n) for n in range(60)])
        store.close(1.0)


def test_what_another_server_evicts_is_a_miss(tmp_path: Path) -> None:
    one = open_store(tmp_path, async_writes=False, flush_interval_s=1e9)
    chain = make_chain(1, 4)
    save_all(one, chain)
    files_in(tmp_path)[0].unlink()
    found = load(one, chain)
    assert len(found) < 4
    one.close(1.0)


def test_files_that_another_server_is_writing_are_left_alone(tmp_path: Path) -> None:
    one = open_store(tmp_path, async_writes=False)
    temporary = tmp_path / NAMESPACE.folder / "tmp" / "123-abc"
    temporary.write_text("half of it")
    two = open_store(tmp_path, async_writes=False)
    settled(two)
    assert temporary.exists()
    two.close(1.0)
    os.utime(temporary, (1.0, 1.0))
    three = open_store(tmp_path, async_writes=False)
    settled(three)
    assert not temporary.exists()
    for store in (one, three):
        store.close(1.0)
