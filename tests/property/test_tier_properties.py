"""Ten thousand random operations on one folder, by two servers that are killed at any call.

What is read is what was saved, the limit holds, every save has one end, and after a sweep the index
and the files agree.
"""

from __future__ import annotations

import errno
import os
import sqlite3
from contextlib import closing, suppress
from pathlib import Path
from random import Random
from typing import Any

import pytest
from tier_fakes import (
    FakeClock,
    FaultFiles,
    Killed,
    files_in,
    load,
    make_chain,
    open_store,
    remains_in,
    settled,
)

from mlx_lm_server.tier import Record, SsdStore

OPERATIONS = 10_000
RUNS = 4
LIMIT_BYTES = 60_000
CHAINS = [make_chain(seed * 100, 6 + seed % 5) for seed in range(12)]
ERRORS = (errno.ENOSPC, errno.EIO, errno.EACCES)
FAULTY_CALLS = (
    "create",
    "write",
    "read",
    "read_files",
    "rename",
    "open",
    "close",
    "unlink",
    "facts",
)


class Server:
    """One server on the folder, inline, which a kill ends at any call to its files."""

    def __init__(self, folder: Path, clock: FakeClock, random: Random) -> None:
        self._folder, self._clock, self._random = folder, clock, random
        self.files = FaultFiles()
        self.store = self._open()

    def _open(self) -> SsdStore:
        return open_store(
            self._folder,
            self.files,
            clock=self._clock,
            async_writes=False,
            max_size_bytes=LIMIT_BYTES,
            flush_interval_s=5.0,
            max_evictions_per_save=self._random.choice([2, 16]),
        )

    def restart(self, *, killed: bool) -> None:
        if not killed:
            assert self.store.close(1.0)
        else:
            sqlite = self.store._io.disk._shelf.index._db  # type: ignore[attr-defined]
            if sqlite is not None:
                sqlite.close()
        self.files.heal()
        self.store = self._open()

    def arm(self) -> None:
        """The kill comes so many calls from now."""
        left = [self._random.randrange(1, 40)]

        def count_down(*_args: Any) -> None:
            left[0] -= 1
            if left[0] == 0:
                raise Killed

        for call in FAULTY_CALLS:
            self.files.before[call] = count_down

    def disturb(self) -> None:
        call, error = self._random.choice(FAULTY_CALLS), self._random.choice(ERRORS)
        self.files.fail(call, error, times=self._random.randrange(1, 4))


def operate(server: Server, clock: FakeClock, random: Random, folder: Path) -> None:
    store, chain = server.store, random.choice(CHAINS)
    part = chain[: random.randrange(1, len(chain) + 1)]
    what = random.random()
    if what < 0.45:
        save_some(store, part, random)
    elif what < 0.75:
        load(store, part)
    elif what < 0.80:
        store.use([part[-1].name])
    elif what < 0.85:
        clock.pass_time(random.choice([0.1, 10.0, 90.0, 3600.0, 86_400.0]))
    elif what < 0.90:
        store.poll()
    elif what < 0.92:
        damage_one(folder, random)
    elif what < 0.95:
        server.disturb()
    elif what < 0.97:
        server.files.heal()
    elif what < 0.98:
        store.abort("req")
    elif what < 0.99:
        server.restart(killed=False)
    else:
        server.arm()


def save_some(store: SsdStore, part: list[Record], random: Random) -> None:
    for record in part:
        if random.random() < 0.9 and store.begin_save(record.nbytes):
            store.save(record, random.choice(["", "req"]))


def damage_one(folder: Path, random: Random) -> None:
    if files := files_in(folder):
        path = random.choice(files)
        with suppress(OSError):
            if random.random() < 0.5:
                path.unlink()
            else:
                contents = bytearray(path.read_bytes())
                contents[random.randrange(len(contents))] ^= 1 << random.randrange(8)
                path.write_bytes(contents)


def check_every_save_ended(store: SsdStore) -> None:
    store.poll()
    c = store.stats().counters
    ends = c.saves_persisted + c.saves_known + c.saves_cancelled + c.saves_unfit + c.save_errors
    assert ends == c.saves


def check_agreement(servers: list[Server], folder: Path, clock: FakeClock) -> None:
    for server in servers:
        server.restart(killed=False)
    for server in servers:  # both sweep, then both commit
        settled(server.store)
    for server in servers * 3:  # what both adopted may be too much: each sees what the other evicts
        clock.pass_time(10.0)
        settled(server.store)
    for server in servers:
        assert server.store.flush(1.0)
    sizes = {path.name[:64]: path.stat().st_size for path in files_in(folder)}
    with closing(sqlite3.connect(folder / "index-1.sqlite")) as db:
        rows = db.execute("SELECT lower(hex(name)), size FROM records").fetchall()
    assert sorted(rows) == sorted(sizes.items())
    for server in servers:
        assert server.store.stats().used_bytes == sum(sizes.values())
        # What the other has removed is only missed when it is read.
        assert server.store.stats().stored_records >= len(sizes)
    assert sum(sizes.values()) <= LIMIT_BYTES


@pytest.mark.parametrize("seed", range(RUNS))
def test_index_and_files_agree_whatever_happens(tmp_path: Path, seed: int) -> None:
    random, clock = Random(seed), FakeClock()
    servers = [Server(tmp_path, clock, random) for _ in range(2)]
    kills = 0
    for n in range(OPERATIONS // RUNS):
        server = random.choice(servers)
        try:
            operate(server, clock, random, tmp_path)
            check_every_save_ended(server.store)
        except Killed:
            kills += 1
            server.restart(killed=True)
        if n % 250 == 249:
            check_agreement(servers, tmp_path, clock)
    assert kills > 5
    for path in remains_in(tmp_path):
        os.utime(path, (1.0, 1.0))
    check_agreement(servers, tmp_path, clock)
    assert remains_in(tmp_path) == []
    for server in servers:
        server.store.close(1.0)
