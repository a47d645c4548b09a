"""Brings index and files into agreement, a small step at a time, while nothing else is to do.

Files without a row are adopted: a server was killed before its commit, or the index was lost. Rows
without a file are dropped. What a killed server left half written is removed once it is old enough
that no living server can be writing it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from mlx_lm_server.tier import codec
from mlx_lm_server.tier.codec import CorruptRecordError
from mlx_lm_server.tier.entries import Entry
from mlx_lm_server.tier.files import read_file
from mlx_lm_server.tier.jobs import Found
from mlx_lm_server.tier.layout import SHARDS, file_name_of, is_namespace, record_name, shard_of
from mlx_lm_server.tier.shelf import Shelf

DIFFERENCES_PER_STEP = 32
ROWS_PER_STEP = 1024
TEMPORARY_MAX_AGE_S = 900.0
HEAD_BYTES = 4096

_Row = tuple[bytes, int, int]  # name, id, size; the last two are for other namespaces only


class Sweep:
    """One pass over all namespaces, the own one first. Owned by the io side."""

    def __init__(self, shelf: Shelf) -> None:
        self._shelf = shelf
        self._files = shelf.files
        self._steps = self._all_steps()

    def step(self) -> bool:
        """Does a little; False when all is done."""
        return next(self._steps, None) is not None

    def _all_steps(self) -> Iterator[bool]:
        for namespace in self._namespaces():
            self._remove_remains(namespace)
            yield True
            yield from self._compare(namespace)
        self._shelf.index.recount()

    def _namespaces(self) -> list[str]:
        own = self._shelf.namespace
        there = filter(is_namespace, self._listed(self._shelf.layout.root))
        return [own, *sorted(set(there) - {own})]

    def _compare(self, namespace: str) -> Iterator[bool]:
        known: dict[str, dict[str, _Row]] = {shard: {} for shard in SHARDS}
        for i, row in enumerate(self._rows_of(namespace), start=1):
            known[shard_of(row[0])][file_name_of(row[0])] = row
            if i % ROWS_PER_STEP == 0:
                yield True
        for shard in SHARDS:
            rows = known.pop(shard)
            there = set(self._listed(self._shelf.layout.shard(namespace, shard)))
            yield True
            for i, file_name in enumerate(sorted(there ^ rows.keys()), start=1):
                if file_name not in there:
                    self._drop_row(namespace, *rows[file_name])
                elif (name := record_name(file_name)) is not None and shard_of(name) == shard:
                    self._adopt(namespace, name)
                if i % DIFFERENCES_PER_STEP == 0:
                    yield True

    def _rows_of(self, namespace: str) -> Iterable[_Row]:
        if namespace == self._shelf.namespace:
            return ((name, 0, 0) for name in self._shelf.index.names())
        none: list[_Row] = []
        return self._shelf.ask(lambda: self._shelf.index.rows_of(namespace), none)

    def _listed(self, folder: Path) -> list[str]:
        """Lists a folder; nothing where that fails: rows are dropped only after a look at each,
        and files without rows wait for another sweep."""
        try:
            return self._files.list_folder(folder)
        except OSError:
            self._shelf.is_in_doubt = True
            return []

    def _drop_row(self, namespace: str, name: bytes, row: int, size: int) -> None:
        try:
            self._files.facts(self._shelf.layout.record(namespace, name))
        except FileNotFoundError:
            if namespace == self._shelf.namespace:
                self._shelf.forget(name)
            else:
                self._shelf.index.forget_row(row, size)
        except OSError:
            return

    def _adopt(self, namespace: str, name: bytes) -> None:
        is_own = namespace == self._shelf.namespace
        if is_own and self._shelf.index.get(name) is not None:
            return  # written since the step began
        path = self._shelf.layout.record(namespace, name)
        try:
            entry = self._entry(path)
        except CorruptRecordError:
            self._shelf.counters.files_removed += self._shelf.remove_quietly(path)
            return
        except OSError:
            self._shelf.is_in_doubt = True  # it still has no row
            return
        if entry.name != name:
            self._shelf.counters.files_removed += self._shelf.remove_quietly(path)
            return
        self._shelf.counters.files_adopted += 1
        self._shelf.index.add(namespace, entry)
        if is_own:
            self._shelf.emit(Found({name: entry.size}))

    def _entry(self, path: Path) -> Entry:
        """Makes a row from the head of a file, whose data are verified when it is read."""
        facts = self._files.facts(path)
        head = read_file(self._files, path, HEAD_BYTES)
        end = codec.header_end(head)
        if end is not None and end > HEAD_BYTES:
            head = read_file(self._files, path, end)
        header = codec.read_header(head)
        if header.file_bytes != facts.size:
            raise CorruptRecordError("torn")
        ticks = self._shelf.ticks
        return Entry(
            name=header.name,
            parent=header.parent,
            kind=header.kind,
            num_tokens=header.num_tokens,
            size=facts.size,
            checksum=header.checksum,
            last_use=min(ticks.of(facts.modified_s), ticks.now()),
        )

    def _remove_remains(self, namespace: str) -> None:
        folder = self._shelf.layout.temporary_folder(namespace)
        now_s = self._shelf.clock.wall_s()
        for file_name in self._listed(folder):
            path = folder / file_name
            try:
                age_s = now_s - self._files.facts(path).modified_s
            except OSError:
                continue
            if age_s > TEMPORARY_MAX_AGE_S:
                self._shelf.counters.files_removed += self._shelf.remove_quietly(path)
