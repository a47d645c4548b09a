"""The index: which records there are, how large, how old. sqlite in WAL mode, shared by servers.

Owned by the io side. Lookups are answered from memory; sqlite is written in batches by `commit`
and asked for what is oldest, over all namespaces. The files are the truth: rows that a crash lost
come back with the sweep, rows whose file is gone go when it is missed.

Rows are appended in order of their ids, and besides those only last use and depth are indexed: a
random key would rewrite a page per record, which for small blocks is a tenth of their bytes.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from mlx_lm_server.tier.entries import Entries, Entry
from mlx_lm_server.tier.files import Files

BUSY_TIMEOUT_S = 0.25
PAGE_BYTES = 1024  # a commit of a few rows writes a few of these
_SCHEMA = """
CREATE TABLE IF NOT EXISTS namespaces (id INTEGER PRIMARY KEY, folder TEXT UNIQUE NOT NULL);
CREATE TABLE IF NOT EXISTS records (
    id INTEGER PRIMARY KEY AUTOINCREMENT,  -- never used twice: other servers read on from the last
    namespace INTEGER NOT NULL,
    name BLOB NOT NULL,
    parent BLOB NOT NULL,
    kind TEXT NOT NULL,
    num_tokens INTEGER NOT NULL,
    size INTEGER NOT NULL,
    checksum BLOB NOT NULL,
    last_use INTEGER NOT NULL              -- in ticks
);
CREATE INDEX IF NOT EXISTS oldest ON records (last_use, num_tokens DESC);
"""
_COLUMNS = "name, parent, kind, num_tokens, size, checksum, last_use"
_NEVER = 1 << 62
_CORRUPT = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)


class IndexUnavailableError(Exception):
    """sqlite could not do it now: locked, full, or an error of the medium."""


class IndexCorruptError(Exception):
    """The file is no index any more."""


@dataclass(frozen=True, slots=True)
class Victim:
    row: int
    namespace: str
    name: bytes
    size: int
    last_use: int


class Index:
    """Knows the rows of one cache folder, of which it holds one namespace's in memory."""

    def __init__(
        self, path: Path, namespace: str, files: Files, busy_timeout_s: float = BUSY_TIMEOUT_S
    ) -> None:
        self._path = path
        self._namespace = namespace
        self._files = files
        self._busy_timeout_s = busy_timeout_s
        self._db: sqlite3.Connection | None = None
        self._inode = 0
        self._data_version = 0
        self._last_row = 0
        self._namespace_ids: dict[str, int] = {}
        self._entries = Entries()
        self._added: list[tuple[str, Entry]] = []
        self._used: set[bytes] = set()
        self._removed: set[int] = set()
        self._passed_over: set[int] = set()
        self.used_bytes = 0  # of all namespaces, with what is not committed yet

    # What is known ----------------------------------------------------------------------------

    def get(self, name: bytes) -> Entry | None:
        return self._entries.get(name)

    @property
    def sizes(self) -> dict[bytes, int]:
        return self._entries.sizes()

    def __len__(self) -> int:
        return len(self._entries)

    def names(self) -> list[bytes]:
        """Lists the records of the own namespace."""
        return self._entries.names()

    def rows_of(self, namespace: str) -> list[tuple[bytes, int, int]]:
        """Returns name, row and size of what should be in another namespace's folder."""
        with self._sqlite() as db:
            found = db.execute(
                "SELECT name, id, size FROM records WHERE namespace = ?",
                (self._namespace_id(db, namespace),),
            )
            return [row for row in found if row[1] not in self._removed]

    def oldest(self, at_most: int, before: int | None = None) -> list[Victim]:
        """Returns records of all namespaces, the least recently used first and of one age the
        deepest: a chain's tail goes before its head. Only those last used before a tick, if one is
        given; what was used here since the last commit is left out."""
        left_out = self._removed | self._passed_over
        with self._sqlite() as db:
            found = db.execute(
                "SELECT r.id, n.folder, r.name, r.size, r.last_use FROM records AS r"
                " JOIN namespaces AS n ON n.id = r.namespace"
                " WHERE r.last_use < ? ORDER BY r.last_use, r.num_tokens DESC LIMIT ?",
                (_NEVER if before is None else before, at_most + len(left_out) + len(self._used)),
            ).fetchall()
        victims = [Victim(*row) for row in found if row[0] not in left_out]
        if not victims:
            self._passed_over.clear()
        return [victim for victim in victims if victim.name not in self._used][:at_most]

    # What changes -----------------------------------------------------------------------------

    def add(self, namespace: str, entry: Entry) -> None:
        if namespace == self._namespace:
            if entry.name in self._entries:
                return
            self._entries.put(entry)
        self._added.append((namespace, entry))
        self.used_bytes += entry.size

    def forget(self, name: bytes) -> None:
        """Drops an entry of the own namespace."""
        entry = self._entries.pop(name)
        if entry is None:
            return
        self.used_bytes -= entry.size
        if entry.row:
            self._removed.add(entry.row)

    def forget_victim(self, victim: Victim) -> None:
        entry = self._entries.get(victim.name)
        if entry is not None and entry.row == victim.row:
            self.forget(victim.name)
        else:
            self.forget_row(victim.row, victim.size)

    def pass_over(self, victim: Victim) -> None:
        """Lets others go before one that cannot be removed."""
        self._passed_over.add(victim.row)

    def forget_row(self, row: int, size: int) -> None:
        """Drops a row of another namespace."""
        if row not in self._removed:
            self._removed.add(row)
            self.used_bytes -= size

    def use(self, name: bytes, tick: int) -> None:
        """Notes a use of a record, and so of the whole chain that it ends."""
        entry = self._entries.get(name)
        while entry is not None and entry.last_use < tick:
            entry.last_use = tick
            self._used.add(entry.name)
            entry = self._entries.get(entry.parent)

    def recount(self) -> None:
        """Lets the next `commit` add up the sizes anew."""
        self._data_version = 0

    # sqlite -----------------------------------------------------------------------------------

    @property
    def is_open(self) -> bool:
        return self._db is not None

    def open(self, tick: int, *, is_durable: bool) -> None:
        """Connects and reads the own namespace's rows. What is in memory and not in the file is
        added to it: after a rebuild that is everything. Uses after `tick`, which is now, were
        noted under a wrong clock and count as of now.

        Raises IndexUnavailableError, IndexCorruptError.
        """
        self._connect(is_durable=is_durable)
        mine = self._entries
        with self._sqlite_or_close() as db:
            db.execute("UPDATE records SET last_use = ?1 WHERE last_use > ?1", (tick,))
            at = self._namespace_id(db, self._namespace)
            rows = db.execute(
                f"SELECT {_COLUMNS}, id FROM records WHERE namespace = ? ORDER BY id", (at,)
            )
            self._entries = Entries(rows)
            self._last_row = self._highest_row(db)
            self._data_version = 0
            self._measure(db)
        self._removed.clear()
        self._used.clear()
        self._added = [(ns, entry) for ns, entry in self._added if ns != self._namespace]
        self.used_bytes += sum(entry.size for _, entry in self._added)
        for name in mine.names():
            if name not in self._entries and (entry := mine.get(name)) is not None:
                entry.row = 0
                self.add(self._namespace, entry)

    def commit(self) -> dict[bytes, int]:
        """Writes what changed and reads what other servers added; returns the sizes of the records
        that they added to the own namespace.

        Raises IndexUnavailableError (what changed waits for the next commit), IndexCorruptError.
        """
        with self._sqlite() as db:
            others = self._committed(db) if self._is_dirty else self._news(db)
            mine = self._take_in(others)
            self._measure(db)
        return {entry.name: entry.size for entry in mine}

    @property
    def has_been_replaced(self) -> bool:
        """Whether the file was deleted, or another server made a new one in its place."""
        return self._db is not None and self._is_another_file

    def discard_file(self) -> None:
        """Closes and deletes a file that is no index any more, unless another server already
        did."""
        is_replaced = self._is_another_file
        self.close()
        if is_replaced:
            return
        for suffix in ("", "-wal", "-shm"):
            with suppress(OSError):
                self._files.unlink(self._path.with_name(self._path.name + suffix))

    @property
    def _is_another_file(self) -> bool:
        """Whether the file is another than the one that was opened last."""
        try:
            return self._files.facts(self._path).inode != self._inode
        except OSError:
            return True

    def close(self) -> None:
        """Closes the connection without a commit."""
        if self._db is not None:
            with closing(self._db):
                self._db = None

    def _connect(self, *, is_durable: bool) -> None:
        self.close()
        self._namespace_ids.clear()
        self._inode = 0
        try:
            self._files.make_folder(self._path.parent)
            db = sqlite3.connect(
                self._path,
                timeout=self._busy_timeout_s,
                isolation_level=None,
                check_same_thread=False,
            )
        except (sqlite3.Error, OSError) as error:
            raise IndexUnavailableError(str(error)) from error
        self._db = db
        try:
            with self._sqlite_or_close():
                db.execute(f"PRAGMA synchronous = {'NORMAL' if is_durable else 'OFF'}")
                db.execute(f"PRAGMA page_size = {PAGE_BYTES}")
                db.execute("PRAGMA journal_mode = WAL")
                db.executescript(_SCHEMA)
        finally:
            with suppress(OSError):
                self._inode = self._files.facts(self._path).inode

    @property
    def _is_dirty(self) -> bool:
        return bool(self._added or self._used or self._removed)

    def _committed(self, db: sqlite3.Connection) -> list[tuple[int, Entry]]:
        """Writes what changed in one transaction, and returns what others added; memory changes
        only once it has ended well."""
        for namespace, _ in self._added:
            self._namespace_id(db, namespace)
        with _transaction(db):
            others = self._news(db)
            theirs = {(namespace, entry.name) for namespace, entry in others}
            db.executemany("DELETE FROM records WHERE id = ?", ((row,) for row in self._removed))
            uses = [entry for name in self._used if (entry := self._entries.get(name))]
            db.executemany(
                "UPDATE records SET last_use = ?1 WHERE id = ?2 AND last_use < ?1",
                ((entry.last_use, entry.row) for entry in uses if entry.row),
            )
            written = list(self._inserted(db, theirs))
            last_row = self._highest_row(db)
        for entry, row in written:
            entry.row = row
        self._last_row = max(self._last_row, last_row)
        self._added.clear()
        self._used.clear()
        self._removed.clear()
        return others

    def _inserted(
        self, db: sqlite3.Connection, theirs: set[tuple[int, bytes]]
    ) -> Iterator[tuple[Entry, int]]:
        for namespace, entry in self._added:
            is_mine = namespace == self._namespace
            is_theirs = (self._namespace_ids[namespace], entry.name) in theirs
            if is_theirs or (is_mine and self._entries.get(entry.name) is not entry):
                continue  # another server was first, or it is forgotten already
            row = db.execute(
                f"INSERT INTO records (namespace, {_COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                (
                    self._namespace_ids[namespace],
                    entry.name,
                    entry.parent,
                    entry.kind,
                    entry.num_tokens,
                    entry.size,
                    entry.checksum,
                    entry.last_use,
                ),
            ).lastrowid
            yield entry, row or 0

    def _news(self, db: sqlite3.Connection) -> list[tuple[int, Entry]]:
        """Returns the rows that others appended since we looked, of all namespaces."""
        rows = db.execute(
            f"SELECT namespace, {_COLUMNS}, id FROM records WHERE id > ? ORDER BY id",
            (self._last_row,),
        )
        return [(row[0], Entry(*row[1:])) for row in rows]

    def _take_in(self, others: list[tuple[int, Entry]]) -> list[Entry]:
        """Takes into memory what is of the own namespace."""
        own = self._namespace_ids[self._namespace]
        mine = [entry for namespace, entry in others if namespace == own]
        for entry in mine:
            self._entries.put(entry)
        self._last_row = max([self._last_row, *(entry.row for _, entry in others)])
        return mine

    def _measure(self, db: sqlite3.Connection) -> None:
        """Adds the sizes up anew where another connection has changed the file."""
        (version,) = db.execute("PRAGMA data_version").fetchone()
        if version != self._data_version:
            (self.used_bytes,) = db.execute("SELECT TOTAL(size) FROM records").fetchone()
            self.used_bytes = int(self.used_bytes)
            self._data_version = version

    def _namespace_id(self, db: sqlite3.Connection, folder: str) -> int:
        if folder not in self._namespace_ids:
            db.execute("INSERT OR IGNORE INTO namespaces (folder) VALUES (?)", (folder,))
            found = db.execute("SELECT id FROM namespaces WHERE folder = ?", (folder,))
            (self._namespace_ids[folder],) = found.fetchone()
        return self._namespace_ids[folder]

    @staticmethod
    def _highest_row(db: sqlite3.Connection) -> int:
        found = db.execute("SELECT seq FROM sqlite_sequence WHERE name = 'records'").fetchone()
        return int(found[0]) if found else 0

    @contextmanager
    def _sqlite(self) -> Iterator[sqlite3.Connection]:
        """Raises sqlite's errors as ours."""
        if self._db is None:
            raise IndexUnavailableError("the index is not open")
        try:
            yield self._db
        except sqlite3.Error as error:
            code = getattr(error, "sqlite_errorcode", 0) & 0xFF
            kind = IndexCorruptError if code in _CORRUPT else IndexUnavailableError
            raise kind(str(error)) from error

    @contextmanager
    def _sqlite_or_close(self) -> Iterator[sqlite3.Connection]:
        """Does as `_sqlite`, and closes what failed halfway."""
        try:
            with self._sqlite() as db:
                yield db
        except (IndexUnavailableError, IndexCorruptError):
            self.close()
            raise


@contextmanager
def _transaction(db: sqlite3.Connection) -> Iterator[None]:
    db.execute("BEGIN IMMEDIATE")
    try:
        yield
        db.execute("COMMIT")
    except BaseException:
        if db.in_transaction:
            db.execute("ROLLBACK")
        raise
