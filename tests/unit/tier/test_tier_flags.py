"""The flags of the disk tier have their effect, by the way that they take to the engine."""

from __future__ import annotations

import errno
import sqlite3
import threading
import time
from contextlib import closing
from pathlib import Path
from typing import Any

from tests.observations import observes
from tier_fakes import NAMESPACE, FaultFiles, Pin, files_in, make_chain, save_all, wait_until

from mlx_lm_server.config import Config, TierConfig
from mlx_lm_server.core.block import chain_name, root_name
from mlx_lm_server.core.tier import Label
from mlx_lm_server.server.boot import load_message
from mlx_lm_server.tier import SsdStore, TierSettings, state_name
from mlx_lm_server.tier.clock import TICK_S


def settings(folder: Path, **flags: Any) -> TierSettings:
    config = Config(tier=TierConfig(ssd_cache_dir=str(folder), **flags))
    order = load_message(config, Path("model")).disk_tier
    assert order is not None
    return TierSettings(Path(order.folder), order.flags)


def open_store(folder: Path, files: FaultFiles | None = None, **flags: Any) -> SsdStore:
    store = SsdStore(settings(folder, **flags), NAMESPACE, files=files)

    def is_open() -> bool:
        store.poll()
        return store.is_open

    wait_until(is_open)
    return store


@observes("TierConfig.ssd_cache_dir")
def test_files_lie_in_the_folder_that_ssd_cache_dir_says(tmp_path: Path) -> None:
    store = open_store(tmp_path / "here")
    save_all(store, make_chain(1, 3))
    assert len(files_in(tmp_path / "here")) == 3
    store.close(5.0)
    home = settings(Path("~/there")).cache_dir
    assert home == Path.home() / "there"


@observes("TierConfig.ssd_durability", "TierConfig.ssd_persistent_max_retries")
def test_ssd_durability_persistent_tries_as_often_as_ssd_persistent_max_retries(
    tmp_path: Path,
) -> None:
    retries = []
    for number, flags in enumerate(
        (
            {"ssd_persistent_max_retries": 2},
            {"ssd_durability": "persistent", "ssd_persistent_max_retries": 2},
            {"ssd_durability": "persistent", "ssd_persistent_max_retries": 0},
        )
    ):
        files = FaultFiles()
        store = open_store(tmp_path / str(number), files, **flags)
        files.fail("write", errno.EIO)
        store.save(make_chain(1, 1)[0])
        assert store.flush(5.0)
        counters = store.stats().counters
        retries.append(counters.save_retries)
        assert counters.save_errors == 1
        store.close(5.0)
    assert retries == [0, 2, 0]


@observes("TierConfig.ssd_async_writes")
def test_without_ssd_async_writes_there_is_no_thread(tmp_path: Path) -> None:
    def num_threads() -> int:
        return sum(thread.name == "tier-io" for thread in threading.enumerate())

    before = num_threads()
    store = open_store(tmp_path, ssd_async_writes=False)
    assert num_threads() == before
    store.save(make_chain(1, 1)[0])
    assert len(files_in(tmp_path)) == 1, "written when save returns"
    store.close(5.0)
    store = open_store(tmp_path)
    assert num_threads() == before + 1
    store.close(5.0)


@observes("TierConfig.ssd_max_size_gb")
def test_the_folder_stays_within_ssd_max_size_gb(tmp_path: Path) -> None:
    store = open_store(tmp_path, ssd_max_size_gb=20e-6)
    save_all(store, make_chain(1, 40))
    stats = store.stats()
    assert stats.limit_bytes == 20_000
    assert 10_000 < stats.used_bytes <= 20_000
    assert stats.counters.evictions > 10
    store.close(5.0)
    assert settings(tmp_path, ssd_max_size_gb=0).flags.max_size_bytes == 0


@observes("TierConfig.ssd_ttl_days")
def test_what_was_not_used_for_ssd_ttl_days_goes(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    save_all(store, make_chain(1, 3))
    store.close(5.0)
    three_days = int(3 * 86400 / TICK_S)
    with closing(sqlite3.connect(tmp_path / "index-1.sqlite")) as index, index:
        index.execute("UPDATE records SET last_use = last_use - ?", (three_days,))
    store = open_store(tmp_path, ssd_ttl_days=0)
    assert len(files_in(tmp_path)) == 3
    store.close(5.0)
    store = open_store(tmp_path, ssd_ttl_days=2)
    wait_until(lambda: not files_in(tmp_path))
    store.close(5.0)


@observes("TierConfig.ssd_writer_queue_size")
def test_no_more_wait_than_ssd_writer_queue_size_and_a_short_backlog(tmp_path: Path) -> None:
    files = FaultFiles()
    store = open_store(tmp_path, files, ssd_writer_queue_size=4)
    pin = Pin(files, "write")
    taken = 0
    for record in make_chain(1, 20):
        if store.begin_save(record.nbytes):
            store.save(record)
            taken += 1
            pin.wait_until_held()
    assert 5 <= taken <= 6
    pin.release()
    store.close(5.0)


@observes("TierConfig.ssd_flush_interval_s")
def test_the_index_is_committed_each_ssd_flush_interval_s(tmp_path: Path) -> None:
    def rows_after(folder: Path, interval_s: float) -> int:
        store = open_store(folder, ssd_flush_interval_s=interval_s)
        time.sleep(0.1)
        for record in make_chain(1, 3):
            store.save(record)
        wait_until(lambda: store.stats().counters.saves_persisted == 3)
        time.sleep(0.2)
        with closing(sqlite3.connect(folder / "index-1.sqlite")) as index:
            [[count]] = index.execute("SELECT count(*) FROM records")
        store.close(5.0)
        return int(count)

    assert rows_after(tmp_path / "often", 0.02) == 3
    assert rows_after(tmp_path / "seldom", 3600.0) == 0


def test_the_core_names_states_as_the_tier_does() -> None:
    parent = root_name("salt")
    assert Label.of_state(parent, (1, 2), 2).name == state_name(chain_name(parent, (1, 2)))
