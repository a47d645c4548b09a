"""Keeps the own namespace's rows in memory."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from mlx_lm_server.tier.records import Kind

# name, parent, kind, num_tokens, size, checksum, last_use, id
Row = tuple[bytes, bytes, Kind, int, int, bytes, int, int]


@dataclass(slots=True)
class Entry:
    """A record's row. `row` is its id, 0 until it is committed."""

    name: bytes
    parent: bytes
    kind: Kind
    num_tokens: int
    size: int
    checksum: bytes
    last_use: int
    row: int = 0


class Entries:
    """Finds rows by name. What is read from the file stays a plain tuple until somebody asks for
    it: a hundred thousand objects would cost the start a quarter of a second, and each garbage
    collection a few milliseconds. A name is in one of the two dicts only."""

    def __init__(self, rows: Iterable[Row] = ()) -> None:
        self._rows = {row[0]: row for row in rows}
        self._entries: dict[bytes, Entry] = {}

    def __len__(self) -> int:
        return len(self._rows) + len(self._entries)

    def __contains__(self, name: bytes) -> bool:
        return name in self._entries or name in self._rows

    def get(self, name: bytes) -> Entry | None:
        row = self._rows.pop(name, None)
        if row is not None:
            self._entries[name] = Entry(*row)
        return self._entries.get(name)

    def put(self, entry: Entry) -> None:
        self._rows.pop(entry.name, None)
        self._entries[entry.name] = entry

    def pop(self, name: bytes) -> Entry | None:
        entry = self.get(name)
        if entry is not None:
            del self._entries[name]
        return entry

    def names(self) -> list[bytes]:
        return [*self._rows, *self._entries]

    def sizes(self) -> dict[bytes, int]:
        sizes = {name: row[4] for name, row in self._rows.items()}
        sizes.update((name, entry.size) for name, entry in self._entries.items())
        return sizes
