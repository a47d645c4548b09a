"""Brings index and files into agreement, a bounded step at a time, while nothing else is to do.

Files without a row are adopted: a server was killed before its commit, or the index was lost. Rows
without a file are dropped. What a killed server left half written is removed once it is old enough
that no living server can be writing it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from mlx_lm_server.tier import codec
from mlx_lm_server.tier.codec import CorruptRecordError
from mlx_lm_server.tier.files import read_file
from mlx_lm_server.tier.index import Entry, Known
from mlx_lm_server.tier.jobs import Found
from mlx_lm_server.tier.layout import SHARDS, is_namespace, record_name, shard_of
from mlx_lm_server.tier.shelf import Shelf

DIFFERENCES_PER_STEP = 32
TEMPORARY_MAX_AGE_S = 900.0
HEAD_BYTES = 4096


class Sweep:
    """One pass over all namespaces, the own one first. Owned by the io side."""

    def __init__(self, shelf: Shelf) -> None:
        self._shelf = shelf
        self._files = shelf.files
        self._steps = self._all_steps()

    def step(self) -> bool:
        """Do a little; False when all is done."""
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
        known: dict[str, dict[bytes, Known]] = defaultdict(dict)
        none: list[Known] = []
        for each in self._shelf.ask(lambda: self._shelf.index.known_in(namespace), none):
            known[shard_of(each.name)][each.name] = each
        yield True
        for shard in SHARDS:
            folder = self._shelf.layout.shard(namespace, shard)
            listed = map(record_name, self._listed(folder))
            there = {name for name in listed if name is not None and shard_of(name) == shard}
            yield True
            for i, name in enumerate(sorted(there ^ known[shard].keys()), start=1):
                if name in there:
                    self._adopt(namespace, name)
                else:
                    self._drop_row(namespace, known[shard][name])
                if i % DIFFERENCES_PER_STEP == 0:
                    yield True

    def _listed(self, folder: Path) -> list[str]:
        """Nothing where the folder cannot be listed: rows are dropped only after a look at each."""
        try:
            return self._files.list_folder(folder)
        except OSError:
            return []

    def _drop_row(self, namespace: str, known: Known) -> None:
        try:
            self._files.facts(self._shelf.layout.record(namespace, known.name))
        except FileNotFoundError:
            if namespace == self._shelf.namespace:
                self._shelf.forget(known.name)
            else:
                self._shelf.index.forget_row(known.row, known.size)
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
            return
        if entry.name != name:
            self._shelf.counters.files_removed += self._shelf.remove_quietly(path)
            return
        self._shelf.counters.files_adopted += 1
        self._shelf.index.add(namespace, entry)
        if is_own:
            self._shelf.emit(Found({name: entry.size}))

    def _entry(self, path: Path) -> Entry:
        """A row from the head of a file. Its data are verified when it is read."""
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
