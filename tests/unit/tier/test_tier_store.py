"""The facade as the engine uses it: saving, reading, aborting, limits, stopping."""

from __future__ import annotations

import errno
import json
import logging
import os
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tier_fakes import (
    NAMESPACE,
    FakeClock,
    FaultFiles,
    Pin,
    as_bytes,
    files_in,
    load,
    make_chain,
    make_record,
    open_store,
    remains_in,
    save_all,
    settings,
    settled,
    wait_until,
    wanted,
)

from mlx_lm_server.tier import Namespace, SsdStore, Wanted, state_name
from mlx_lm_server.tier.clock import TICK_S
from mlx_lm_server.tier.jobs import LoadJob, SaveJob
from mlx_lm_server.tier.mailbox import Mailbox
from mlx_lm_server.tier.read_speed import FIRST_GUESS_BYTES_PER_S
from mlx_lm_server.tier.records import Ticket

WAYS = [
    pytest.param({"async_writes": True}, id="thread"),
    pytest.param({"async_writes": False}, id="inline"),
    pytest.param({"durability": "persistent"}, id="persistent"),
]


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest) -> dict[str, Any]:
    return dict(request.param)


def ended_saves(store: SsdStore) -> int:
    c = store.stats().counters
    return c.saves_persisted + c.saves_known + c.saves_cancelled + c.saves_unfit + c.save_errors


# Saving and reading


def test_what_was_saved_is_read_back_also_after_a_restart(
    tmp_path: Path, way: dict[str, Any]
) -> None:
    chain = make_chain(1, 20)
    store = open_store(tmp_path, **way)
    assert not store.has(chain[0].name)
    save_all(store, chain)
    assert all(store.has(record.name) for record in chain)
    assert load(store, chain) == [as_bytes(record) for record in chain]
    assert store.close(5.0)
    again = open_store(tmp_path, **way)
    assert all(again.has(record.name) for record in chain)
    assert load(again, chain) == [as_bytes(record) for record in chain]
    assert again.stats().used_bytes == sum(path.stat().st_size for path in files_in(tmp_path))
    assert again.close(5.0)


def test_counters_tell_accepted_from_persisted(tmp_path: Path, way: dict[str, Any]) -> None:
    store = open_store(tmp_path, **way)
    save_all(store, make_chain(1, 5))
    counters = store.stats().counters
    assert (counters.saves, counters.saves_persisted) == (5, 5)
    store.close(5.0)


def test_a_state_and_the_block_that_ends_with_it_are_stored_side_by_side(tmp_path: Path) -> None:
    store = open_store(tmp_path, async_writes=False)
    block = make_record(1)
    state = replace(make_record(2, kind="state"), name=state_name(block.name), parent=block.name)
    save_all(store, [block, state])
    assert load(store, [state, block]) == [as_bytes(state), as_bytes(block)]
    store.close(5.0)


def test_a_record_on_its_way_is_there_and_is_read_from_memory(tmp_path: Path) -> None:
    files = FaultFiles()
    store = open_store(tmp_path, files)
    first, second = make_chain(1, 2)
    pin = Pin(files, "write")
    store.save(first)
    pin.wait_until_held()
    store.save(second)
    assert store.has(second.name)
    assert not store.save(second), "once is enough"
    ticket = store.prefetch(wanted([second]), "r")
    pin.release()
    read: list[Any] = []
    wait_until(lambda: bool(read.extend(store.poll()) or read))
    assert read[0].ticket == ticket
    assert as_bytes(read[0].records[0]) == as_bytes(second)
    assert files.calls["read_files"] == 0
    assert store.stats().read_bytes_per_s == FIRST_GUESS_BYTES_PER_S, "no disk was read"
    store.close(5.0)


def test_a_read_that_hangs_holds_up_no_stop(tmp_path: Path) -> None:
    files, chain = FaultFiles(), make_chain(1, 3)
    store = open_store(tmp_path, files)
    save_all(store, chain)
    assert store.flush(5.0)
    pin = Pin(files, "read_files")
    store.prefetch(wanted(chain), "r")
    pin.wait_until_held()
    begun_s = time.monotonic()
    assert store.close(0.2), "nothing was left to write"
    assert time.monotonic() - begun_s < 2.0
    pin.release()


def test_a_read_ends_at_the_first_record_that_is_absent(
    tmp_path: Path, way: dict[str, Any]
) -> None:
    store = open_store(tmp_path, **way)
    chain = make_chain(1, 4)
    save_all(store, [chain[0], chain[1], chain[3]])
    assert len(load(store, chain)) == 2
    assert load(store, [make_record(99)]) == []
    store.close(5.0)


def test_another_token_under_a_name_is_a_miss(tmp_path: Path) -> None:
    store = open_store(tmp_path, async_writes=False)
    record = make_record(1)
    save_all(store, [record])
    store.prefetch([Wanted(record.name, (*record.token_ids[:-1], -1))], "r")
    assert [read.records for read in store.poll()] == [()]
    assert store.stats().counters.mismatched == 1
    store.close(5.0)


def test_inline_reads_are_bounded_per_step(tmp_path: Path) -> None:
    store = open_store(tmp_path, async_writes=False, inline_loads_per_step=4)
    chain = make_chain(1, 10)
    save_all(store, chain)
    store.prefetch(wanted(chain), "r")
    polls = [store.poll() for _ in range(3)]
    assert [len(read) for read in polls] == [0, 0, 1]
    assert len(polls[2][0].records) == 10
    store.close(5.0)


def test_the_forecast_follows_what_reads_took(tmp_path: Path) -> None:
    store = open_store(tmp_path, async_writes=False)
    record = make_record(1, nbytes=1 << 20)
    save_all(store, [record])
    assert store.size_of(record.name) > 1 << 20
    before = store.read_forecast_s([record.name])
    load(store, [record])
    assert 0 < store.read_forecast_s([record.name]) != before
    assert store.read_forecast_s([make_record(2).name]) == 0
    store.close(5.0)


def test_the_engine_is_woken_when_a_read_ends(tmp_path: Path) -> None:
    woken: list[int] = []
    store = SsdStore(settings(tmp_path), NAMESPACE, wake=lambda: woken.append(1))
    wait_until(lambda: bool(woken))
    woken.clear()
    store.prefetch(wanted([make_record(1)]), "r")
    wait_until(lambda: bool(woken))
    assert [read.records for read in store.poll()] == [()]
    store.close(5.0)


@pytest.mark.skipif(sys.platform != "linux", reason="a policy of Linux")
def test_the_io_thread_takes_no_core_from_one_that_computes(tmp_path: Path) -> None:
    mine, before = os.sched_getscheduler(0), threading.enumerate()
    store = open_store(tmp_path)
    (thread,) = set(threading.enumerate()) - set(before)
    assert thread.native_id is not None
    assert os.sched_getscheduler(thread.native_id) == os.SCHED_BATCH
    assert os.sched_getscheduler(0) == mine
    store.close(5)


def test_namespaces_share_nothing_and_say_what_they_are(tmp_path: Path) -> None:
    other = Namespace(b"\1" * 32, {"model": "other", "rank": "1"})
    ours, theirs = open_store(tmp_path), open_store(tmp_path, namespace=other)
    record = make_record(1)
    save_all(ours, [record])
    save_all(theirs, [make_record(2)])
    assert not theirs.has(record.name)
    assert load(theirs, [record]) == []
    about = json.loads((tmp_path / other.folder / "meta.json").read_text())
    assert about["about"] == {"model": "other", "rank": "1"}
    ours.close(5.0)
    theirs.close(5.0)


# The queue


def test_a_read_goes_before_the_saves_that_wait(tmp_path: Path) -> None:
    mailbox = Mailbox(settings(tmp_path), FakeClock())
    record = make_record(1)
    saves = [SaveJob(record, "", record.nbytes) for _ in range(2)]
    read = LoadJob(Ticket(1, "r"), tuple(wanted([record])), {}, record.nbytes)
    for job in (*saves, read):
        mailbox.put(job)
    assert [mailbox.take(0.0) for _ in range(3)] == [read, *saves]


def test_a_full_queue_is_known_before_the_bytes_are_extracted(tmp_path: Path) -> None:
    files = FaultFiles()
    store = open_store(tmp_path, files, writer_queue_size=4, backlog_wait_s=60.0)
    pin = Pin(files, "write")
    records = make_chain(1, 20)
    taken = []
    for record in records:
        if store.begin_save(record.nbytes):
            store.save(record)
            taken.append(record)
            pin.wait_until_held()
    assert 5 <= len(taken) <= 6  # one in the writer's hands, four in the queue, one in the backlog
    assert store.stats().counters.write_drops == 20 - len(taken)
    pin.release()
    assert store.flush(5.0)
    assert store.stats().counters.saves_persisted == len(taken)
    assert store.room_for(1)
    store.close(5.0)


def test_the_queue_is_bounded_in_bytes_but_takes_one_large_record(tmp_path: Path) -> None:
    files = FaultFiles()
    store = open_store(tmp_path, files, max_pending_bytes=3000)
    pin = Pin(files, "write")
    assert store.room_for(5000)
    store.save(make_record(1, nbytes=2000))
    pin.wait_until_held()
    assert store.room_for(1000)
    assert not store.room_for(1001)
    pin.release()
    store.close(5.0)


def test_a_backlog_is_ridden_over_for_a_bounded_time(tmp_path: Path) -> None:
    """A slow writer: what came to the full queue is dropped on the io side when it waited long."""
    files = FaultFiles()
    store = open_store(tmp_path, files, writer_queue_size=2, backlog_wait_s=0.0)
    pin = Pin(files, "write")
    records = make_chain(1, 4)
    store.save(records[0])
    pin.wait_until_held()
    for record in records[1:]:
        assert store.begin_save(record.nbytes)
        store.save(record)
    pin.release()
    assert store.flush(5.0)
    counters = store.stats().counters
    assert (counters.saves_persisted, counters.saves_unfit, counters.write_drops) == (3, 1, 1)
    assert not store.has(records[3].name)
    store.close(5.0)


# Abort, reset, stop


@pytest.mark.parametrize("call", ["create", "write", "close", "rename"])
@pytest.mark.parametrize("how", ["abort", "reset"])
def test_an_abort_while_its_write_is_in_flight_leaves_nothing(
    tmp_path: Path, call: str, how: str
) -> None:
    files = FaultFiles()
    store = open_store(tmp_path, files)
    chain = make_chain(1, 3)
    pin = Pin(files, call)
    for record in chain:
        store.save(record, "req-1")
    pin.wait_until_held()
    store.abort("req-1") if how == "abort" else store.reset()
    assert not any(store.has(record.name) for record in chain)
    assert store.stats().pending_saves == 1, "what waited is gone at once"
    pin.release()
    assert store.flush(5.0)
    assert files_in(tmp_path) == []
    assert remains_in(tmp_path) == []
    assert store.stats().counters.saves_cancelled == 3
    save_all(store, chain, "req-1")  # the same id and the same names, again
    assert len(load(store, chain, "req-1")) == 3
    assert ended_saves(store) == store.stats().counters.saves == 6
    store.close(5.0)


def test_the_same_request_saves_again_while_its_aborted_write_is_held(tmp_path: Path) -> None:
    files = FaultFiles()
    store = open_store(tmp_path, files)
    record = make_record(1)
    pin = Pin(files, "rename")
    store.save(record, "req-1")
    pin.wait_until_held()
    store.abort("req-1")
    assert store.save(record, "req-1")
    pin.release()
    assert store.flush(5.0)
    assert len(load(store, [record])) == 1
    assert len(files_in(tmp_path)) == 1
    store.close(5.0)


def test_an_abort_gives_no_read_back_and_frees_the_owner(tmp_path: Path) -> None:
    files = FaultFiles()
    store = open_store(tmp_path, files)
    chain = make_chain(1, 30)
    save_all(store, chain)
    pin = Pin(files, "read_files")
    store.prefetch(wanted(chain), "req-1")
    pin.wait_until_held()
    store.abort("req-1")
    assert store.stats().pending_reads == 0
    pin.release()
    assert len(load(store, chain, "req-1")) == 30  # asserts that the first thing read is its own
    assert files.calls["read_files"] < 50, "the aborted read stopped where it was"
    store.close(5.0)


def test_an_abort_takes_back_a_read_that_has_ended_and_was_not_polled(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    record = make_record(1)
    save_all(store, [record])
    for owner in ("gone", "stays"):
        store.prefetch(wanted([record]), owner)
    assert store.flush(5.0)
    store.abort("gone")
    assert [read.ticket.owner for read in store.poll()] == ["stays"]
    store.close(5.0)


def test_an_abort_leaves_others_and_the_unowned_alone(tmp_path: Path) -> None:
    files = FaultFiles()
    store = open_store(tmp_path, files)
    mine, theirs, unowned, first = (make_record(n) for n in range(4))
    pin = Pin(files, "write")
    store.save(first)
    pin.wait_until_held()
    store.save(mine, "mine")
    store.save(theirs, "theirs")
    store.save(unowned)
    store.abort("mine")
    store.abort("nobody")
    pin.release()
    assert store.flush(5.0)
    assert len(load(store, [theirs, unowned, first])) == 3
    store.close(5.0)


def test_a_stop_drains_flushes_and_closes(tmp_path: Path, way: dict[str, Any]) -> None:
    store = open_store(tmp_path, **way)
    chain = make_chain(1, 50)
    for record in chain:
        store.save(record)
    assert store.close(10.0)
    assert store.close(10.0), "twice is once"
    again = open_store(tmp_path, **way)
    assert len(load(again, chain)) == 50
    again.close(5.0)


def test_a_stop_while_the_writer_is_stuck_ends_in_time_and_leaves_nothing(tmp_path: Path) -> None:
    files = FaultFiles()
    store = open_store(tmp_path, files)
    chain = make_chain(1, 3)
    pin = Pin(files, "write")
    for record in chain:
        store.save(record)
    pin.wait_until_held()
    assert not store.close(0.05)
    assert store.stats().counters.write_drops == 3
    assert not store.begin_save(10)
    assert not store.save(make_record(9))
    pin.release()
    wait_until(lambda: not remains_in(tmp_path))
    assert files_in(tmp_path) == []


def test_a_closed_store_answers_that_nothing_is_there(tmp_path: Path, way: dict[str, Any]) -> None:
    store = open_store(tmp_path, **way)
    store.close(5.0)
    assert load(store, [make_record(1)]) == []
    assert store.flush(0.1)
    store.use([make_record(1).name])
    store.abort("x")
    store.reset()


def test_a_graceful_stop_may_save_more_than_the_queue_takes(tmp_path: Path) -> None:
    files = FaultFiles()
    files.before["write"] = lambda *_args: time.sleep(0.002)
    store = open_store(tmp_path, files, writer_queue_size=2, backlog_wait_s=0.0)
    chain = make_chain(1, 60)
    store.keep_late()
    for record in chain:
        assert store.wait_for_room(record.nbytes, 5.0)
        store.save(record)
    assert store.close(5.0)
    assert len(files_in(tmp_path)) == 60


# Limits and ages


def size_of_one(folder: Path) -> int:
    store = open_store(folder / "probe", async_writes=False)
    save_all(store, [make_record(0)])
    size = store.stats().used_bytes
    store.close(1.0)
    return size


def test_the_limit_holds_after_every_save_and_the_oldest_go(tmp_path: Path) -> None:
    one, clock = size_of_one(tmp_path), FakeClock()
    folder = tmp_path / "cache"
    store = open_store(folder, async_writes=False, max_size_bytes=one * 11, clock=clock)
    records = [make_record(n) for n in range(40)]
    for record in records:
        clock.pass_time(TICK_S)
        save_all(store, [record])
        on_disk = sum(path.stat().st_size for path in files_in(folder))
        assert on_disk <= one * 11
        assert on_disk == store.stats().used_bytes
    there = [store.has(record.name) for record in records]
    assert there == sorted(there), "the newest are the ones that stayed"
    assert 8 <= sum(there) <= 11
    assert store.stats().counters.evictions == 40 - sum(there)
    assert store.stats().counters.write_drops == 0
    store.close(1.0)


def test_a_chains_tail_goes_before_its_head(tmp_path: Path) -> None:
    one, clock = size_of_one(tmp_path), FakeClock()
    store = open_store(tmp_path / "cache", async_writes=False, max_size_bytes=one * 8, clock=clock)
    chain = make_chain(1, 6)
    for record in chain:
        save_all(store, [record])
        clock.pass_time(TICK_S)  # saved minutes apart, and yet of one age
    save_all(store, [make_record(100 + n) for n in range(4)])
    there = [store.has(record.name) for record in chain]
    assert there == sorted(there, reverse=True)
    assert 0 < sum(there) < 6
    store.close(1.0)


def test_a_use_from_memory_keeps_a_chain_on_disk(tmp_path: Path) -> None:
    one, clock = size_of_one(tmp_path), FakeClock()
    store = open_store(tmp_path / "cache", async_writes=False, max_size_bytes=one * 8, clock=clock)
    used, unused = make_chain(1, 3), make_chain(50, 3)
    save_all(store, [*used, *unused])
    clock.pass_time(10 * TICK_S)
    store.use([used[-1].name])
    save_all(store, [make_record(100 + n) for n in range(4)])
    assert all(store.has(record.name) for record in used)
    assert not all(store.has(record.name) for record in unused)
    store.close(1.0)


def test_evictions_are_bounded_per_save_and_drained_by_later_ones(tmp_path: Path) -> None:
    one = size_of_one(tmp_path)
    folder = tmp_path / "cache"
    store = open_store(folder, async_writes=False)
    save_all(store, [make_record(n) for n in range(100)])
    store.close(1.0)
    store = open_store(
        folder,
        async_writes=False,
        max_size_bytes=one * 50,
        max_evictions_per_save=7,
        flush_interval_s=1e9,  # so that only saves evict
    )
    gone = []
    for n in range(15):
        before = len(files_in(folder))
        store.save(make_record(1000 + n))
        gone.append(before - len(files_in(folder)))
    assert max(gone) == 7
    assert len(files_in(folder)) <= 50
    assert store.stats().counters.saves_unfit > 0, "what did not fit yet was dropped"
    assert store.has(make_record(1014).name)
    store.close(1.0)


def test_files_that_cannot_be_removed_are_passed_over(tmp_path: Path) -> None:
    one, files = size_of_one(tmp_path), FaultFiles()
    folder = tmp_path / "cache"
    store = open_store(
        folder, files, async_writes=False, max_size_bytes=one * 10, max_evictions_per_save=3
    )
    stuck = [make_record(n) for n in range(3)]
    save_all(store, [*stuck, *(make_record(10 + n) for n in range(7))])

    def refuse_the_stuck(path: Path) -> None:
        if any(record.name.hex() in path.name for record in stuck):
            raise OSError(errno.EACCES, "injected")

    files.before["unlink"] = refuse_the_stuck
    later = [make_record(100 + n) for n in range(12)]
    save_all(store, later)
    # The sweep that looks after a failure may find the stuck ones again, and try them again.
    assert sum(store.has(record.name) for record in later) >= 5
    assert store.stats().counters.evictions > 0
    store.close(1.0)


def test_a_record_larger_than_the_limit_evicts_nobody(tmp_path: Path) -> None:
    store = open_store(tmp_path, async_writes=False, max_size_bytes=4000)
    save_all(store, [make_record(1)])
    assert not store.begin_save(8000)
    store.save(make_record(2, nbytes=8000))
    store.poll()
    assert store.has(make_record(1).name)
    assert store.stats().counters.saves_unfit == 1
    store.close(1.0)


def test_the_limit_is_a_share_of_what_is_free(tmp_path: Path) -> None:
    one, files = size_of_one(tmp_path), FaultFiles()
    folder = tmp_path / "cache"
    disk_bytes = one * 20

    def free_bytes(_path: Path) -> int:
        return disk_bytes - sum(path.stat().st_size for path in files_in(folder))

    files.instead["free_bytes"] = free_bytes
    store = open_store(folder, files, async_writes=False, max_size_bytes=0, free_share=0.5)
    for n in range(30):
        save_all(store, [make_record(n)])
    assert store.stats().limit_bytes == pytest.approx(disk_bytes / 2, abs=1)
    assert len(files_in(folder)) <= 10
    store.close(1.0)


def test_unlimited_is_unlimited(tmp_path: Path) -> None:
    store = open_store(tmp_path, async_writes=False, max_size_bytes=0, free_share=1.0, ttl_s=0)
    save_all(store, [make_record(n) for n in range(20)])
    settled(store)
    assert len(files_in(tmp_path)) == 20
    store.close(1.0)


def test_what_nobody_used_for_its_lifetime_goes_a_few_at_a_time(tmp_path: Path) -> None:
    clock = FakeClock()
    given = {"async_writes": False, "clock": clock, "ttl_s": 3600.0, "max_evictions_per_save": 4}
    store = open_store(tmp_path, **given)
    old, kept = make_chain(1, 10), make_chain(50, 5)
    save_all(store, [*old, *kept])
    clock.pass_time(3000)
    store.use([kept[-1].name])
    store.poll()
    clock.pass_time(1200)
    store.poll()
    assert len(files_in(tmp_path)) == 11
    for _ in range(3):
        clock.pass_time(1)
        store.poll()
    assert len(files_in(tmp_path)) == 5
    assert all(store.has(record.name) for record in kept)
    assert store.stats().counters.expired == 10
    store.close(1.0)


@pytest.mark.parametrize("jump_s", [-400 * 86_400.0, 400 * 86_400.0])
def test_a_clock_that_jumps_expires_nothing_while_we_run(tmp_path: Path, jump_s: float) -> None:
    clock = FakeClock()
    store = open_store(tmp_path, async_writes=False, clock=clock)
    chain = make_chain(1, 5)
    save_all(store, chain)
    clock.wall += jump_s
    clock.monotonic += 10
    settled(store)
    assert len(load(store, chain)) == 5
    store.close(1.0)
    clock.wall -= jump_s
    again = open_store(tmp_path, async_writes=False, clock=clock)
    assert len(load(again, chain)) == 5
    again.close(1.0)


# One line in the log


def test_a_late_failure_is_one_error_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    files = FaultFiles()
    store = open_store(tmp_path, files)
    files.fail("write", 5)
    for record in make_chain(1, 3):
        store.save(record)
    assert store.flush(5.0)
    lines = [line for line in caplog.records if line.levelno >= logging.ERROR]
    assert len(lines) == 1
    assert store.stats().counters.save_errors == 3
    assert store.stats().counters.saves == 3
    store.close(5.0)
