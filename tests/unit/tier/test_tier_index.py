"""The index: order of eviction, two servers in one file, and a file that is locked or broken."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from mlx_lm_server.tier.entries import Entry
from mlx_lm_server.tier.files import OsFiles
from mlx_lm_server.tier.index import Index, IndexCorruptError, IndexUnavailableError

OURS, OTHERS = "a" * 32, "b" * 32
NOW = 1000


def entry(n: int, *, parent: int = 0, tick: int = 1, size: int = 10) -> Entry:
    return Entry(
        name=n.to_bytes(32, "big"),
        parent=parent.to_bytes(32, "big"),
        kind="block",
        num_tokens=n * 16,
        size=size,
        checksum=bytes(16),
        last_use=tick,
    )


def opened(folder: Path, namespace: str = OURS) -> Index:
    index = Index(folder / "index.sqlite", namespace, OsFiles(), busy_timeout_s=0.01)
    index.open(NOW, is_durable=False)
    return index


@pytest.fixture
def index(tmp_path: Path) -> Iterator[Index]:
    index = opened(tmp_path)
    yield index
    index.close()


def numbers(index: Index, at_most: int = 99, before: int | None = None) -> list[int]:
    return [int.from_bytes(v.name, "big") for v in index.oldest(at_most, before)]


def test_what_is_committed_is_there_after_a_restart(tmp_path: Path, index: Index) -> None:
    index.add(OURS, entry(1))
    index.commit()
    index.add(OURS, entry(2))
    index.close()
    again = opened(tmp_path)
    assert again.sizes == {entry(1).name: 10}
    assert again.used_bytes == 10
    again.close()


def test_the_oldest_go_first_and_of_one_age_the_deepest(index: Index) -> None:
    for n, tick in [(1, 5), (2, 5), (3, 5), (4, 3), (5, 9)]:
        index.add(OURS, entry(n, tick=tick))
    index.commit()
    assert numbers(index) == [4, 3, 2, 1, 5]
    assert numbers(index, 2) == [4, 3]
    assert numbers(index, before=5) == [4]


def test_a_use_makes_the_whole_chain_young(index: Index) -> None:
    for n in (1, 2, 3):
        index.add(OURS, entry(n, parent=n - 1))
    index.add(OURS, entry(9, tick=2))
    index.use(entry(2).name, 7)
    index.commit()
    assert numbers(index) == [3, 9, 2, 1]


def test_what_was_used_since_the_commit_is_no_victim(index: Index) -> None:
    index.add(OURS, entry(1))
    index.add(OURS, entry(2))
    index.commit()
    index.use(entry(2).name, 5)
    assert numbers(index) == [1]


def test_what_cannot_be_removed_lets_others_go_first(index: Index) -> None:
    index.add(OURS, entry(1))
    index.add(OURS, entry(2))
    index.commit()
    stuck = index.oldest(1)[0]
    index.pass_over(stuck)
    assert numbers(index, 1) == [1]


def test_forgotten_rows_are_gone_before_and_after_the_commit(index: Index) -> None:
    for n in (1, 2, 3):
        index.add(OURS, entry(n))
    index.forget(entry(3).name)
    index.commit()
    index.forget(entry(1).name)
    assert numbers(index) == [2]
    assert index.used_bytes == 10
    index.commit()
    assert numbers(index) == [2]
    assert index.used_bytes == 10


def test_two_servers_see_each_other_and_keep_one_row_each(tmp_path: Path, index: Index) -> None:
    other = opened(tmp_path)
    other.add(OURS, entry(1))
    other.add(OURS, entry(2))
    other.commit()
    index.add(OURS, entry(2))
    index.add(OURS, entry(3))
    assert index.commit() == {entry(1).name: 10, entry(2).name: 10}
    assert other.commit() == {entry(3).name: 10}
    assert sorted(numbers(index)) == [1, 2, 3]
    assert index.used_bytes == other.used_bytes == 30
    other.close()


def test_the_limit_is_over_all_namespaces(tmp_path: Path, index: Index) -> None:
    other = opened(tmp_path, OTHERS)
    other.add(OTHERS, entry(7, tick=1))
    other.commit()
    index.add(OURS, entry(1, tick=2))
    index.commit()
    assert index.used_bytes == 20
    assert [v.namespace for v in index.oldest(9)] == [OTHERS, OURS]
    assert index.get(entry(7).name) is None
    index.forget_victim(index.oldest(1)[0])
    index.commit()
    other.commit()
    assert index.used_bytes == other.used_bytes == 10
    other.close()


def test_uses_under_a_wrong_clock_are_brought_back(tmp_path: Path, index: Index) -> None:
    index.add(OURS, entry(1, tick=NOW * 9))
    index.commit()
    index.close()
    again = opened(tmp_path)
    assert again.oldest(1)[0].last_use == NOW
    again.close()


def test_a_locked_index_keeps_what_changed_for_the_next_commit(
    tmp_path: Path, index: Index
) -> None:
    with closing(sqlite3.connect(tmp_path / "index.sqlite", isolation_level=None)) as locker:
        locker.execute("BEGIN EXCLUSIVE")
        index.add(OURS, entry(1))
        with pytest.raises(IndexUnavailableError):
            index.commit()
        locker.execute("ROLLBACK")
    index.commit()
    assert numbers(index) == [1]
    assert index.used_bytes == 10


def test_a_broken_index_is_known_as_such_and_built_anew_from_memory(tmp_path: Path) -> None:
    index = opened(tmp_path)
    index.add(OURS, entry(1))
    index.commit()
    index.close()
    (tmp_path / "index.sqlite").write_bytes(os.urandom(8192))
    with pytest.raises(IndexCorruptError):
        index.open(NOW, is_durable=False)
    index.discard_file()
    index.open(NOW, is_durable=False)
    index.commit()
    assert numbers(index) == [1]
    assert index.used_bytes == 10
    index.close()


def test_a_deleted_or_replaced_file_is_noticed(tmp_path: Path, index: Index) -> None:
    assert not index.has_been_replaced
    for path in tmp_path.glob("index.sqlite*"):
        path.unlink()
    assert index.has_been_replaced
    newer = opened(tmp_path)
    assert index.has_been_replaced
    index.discard_file()
    assert not newer.has_been_replaced, "the other server's new file stays"
    newer.close()


def test_a_commit_writes_few_bytes_a_row(tmp_path: Path, index: Index) -> None:
    for n in range(1, 2001):
        index.add(OURS, entry(n))
    index.commit()
    index.close()
    assert (tmp_path / "index.sqlite").stat().st_size < 2000 * 200
