"""Reads records back and believes nothing: size, checksum, name and token ids must be right."""

from __future__ import annotations

import errno
import logging
from concurrent.futures import Future
from functools import partial

from mlx_lm_server.tier import codec
from mlx_lm_server.tier.codec import CorruptRecordError
from mlx_lm_server.tier.entries import Entry
from mlx_lm_server.tier.files import read_file
from mlx_lm_server.tier.jobs import LoadJob
from mlx_lm_server.tier.read_pool import ReadPool
from mlx_lm_server.tier.records import Record, Wanted
from mlx_lm_server.tier.shelf import Shelf

READS_AT_A_TIME = 4
OUT_OF_HANDLES = (errno.EMFILE, errno.ENFILE)  # says nothing about the file

log = logging.getLogger(__name__)


class RecordReader:
    """Owned by the io side."""

    def __init__(self, shelf: Shelf) -> None:
        self._shelf = shelf
        self._pool = ReadPool(READS_AT_A_TIME) if shelf.settings.async_writes else None
        self._begun: dict[bytes, Future[bytes]] = {}

    def begin(self, job: LoadJob) -> None:
        """Start to read what the job wants, for `read` to take one by one, until `end`."""
        if self._pool is None:
            return
        for wanted in job.wanted:
            entry = self._shelf.index.get(wanted.name)
            if entry is not None and wanted.name not in job.at_hand:
                self._begun[wanted.name] = self._pool.submit(partial(self._contents, entry))

    def end(self) -> None:
        """Drop what was begun and is not wanted any more."""
        for future in self._begun.values():
            future.cancel()
        self._begun.clear()

    def close(self) -> None:
        if self._pool is not None:
            self._pool.close()

    def read(self, job: LoadJob, wanted: Wanted) -> Record | None:
        """The record, or None where it is absent for whatever reason; then it is forgotten."""
        self._shelf.counters.loads += 1
        record = job.at_hand.get(wanted.name) or self._stored(wanted.name)
        if record is None:
            return None
        if (record.name, record.token_ids) != (wanted.name, wanted.token_ids):
            self._shelf.counters.mismatched += 1
            return None
        self._shelf.counters.loads_hit += 1
        self._shelf.index.use(wanted.name, self._shelf.ticks.now())
        return record

    def _stored(self, name: bytes) -> Record | None:
        shelf = self._shelf
        entry = shelf.index.get(name)
        if entry is None:
            return None
        try:
            return self._verified(entry)
        except FileNotFoundError:
            shelf.counters.vanished += 1
            shelf.is_in_doubt = True
        except CorruptRecordError as error:
            shelf.counters.corrupt += 1
            log.warning("the disk tier drops %s: %s", name.hex(), error)
            shelf.remove_quietly(shelf.path(name))
        except OSError as error:
            shelf.counters.load_errors += 1
            log.warning("the disk tier could not read %s: %s", name.hex(), error)
            if error.errno in OUT_OF_HANDLES:
                return None
            shelf.remove_quietly(shelf.path(name))
        shelf.forget(name)
        return None

    def _verified(self, entry: Entry) -> Record:
        begun = self._begun.pop(entry.name, None)
        contents = begun.result() if begun is not None else self._contents(entry)
        self._shelf.counters.bytes_read += len(contents)
        record, checksum = codec.decode(contents)
        if checksum != entry.checksum or record.name != entry.name:
            raise CorruptRecordError("another record than the one that was written")
        return record

    def _contents(self, entry: Entry) -> bytes:
        """One byte more than there should be, if there is one. Raises OSError."""
        return read_file(self._shelf.files, self._shelf.path(entry.name), entry.size + 1)
