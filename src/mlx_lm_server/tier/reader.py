"""Reads records back and believes nothing: size, checksum, name and token ids must be right."""

from __future__ import annotations

import errno
import logging
from collections import deque
from collections.abc import Generator, Sequence

from mlx_lm_server.tier import codec
from mlx_lm_server.tier.codec import CorruptRecordError
from mlx_lm_server.tier.entries import Entry
from mlx_lm_server.tier.jobs import LoadJob
from mlx_lm_server.tier.reading import Contents
from mlx_lm_server.tier.records import Record, Wanted
from mlx_lm_server.tier.shelf import Shelf

OUT_OF_HANDLES = (errno.EMFILE, errno.ENFILE)  # says nothing about the file

log = logging.getLogger(__name__)


class RecordReader:
    """Owned by the io side."""

    def __init__(self, shelf: Shelf) -> None:
        self._shelf = shelf
        self._reads_ahead = shelf.settings.flags.ssd_async_writes
        self._begun: deque[bytes] = deque()
        self._reading: Generator[Contents] | None = None

    def begin(self, job: LoadJob) -> None:
        """Starts to read what the job wants, for `read` to take one by one, until `end`; nothing
        with inline writes, where `read` does it."""
        if not self._reads_ahead:
            return
        stored = (self._shelf.index.get(w.name) for w in job.wanted if w.name not in job.at_hand)
        entries = [entry for entry in stored if entry is not None]
        self._begun.extend(entry.name for entry in entries)
        self._reading = self._read(entries)

    def end(self) -> None:
        """Drops what was begun and is not wanted any more."""
        self._begun.clear()
        if self._reading is not None:
            self._reading.close()
            self._reading = None

    def read(self, job: LoadJob, wanted: Wanted) -> Record | None:
        """Returns the record, or None where it is not there, cannot be read or is another. What is
        missing or damaged is forgotten, and so is what cannot be read, unless handles ran out."""
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
        contents = self._contents(entry)
        self._shelf.counters.bytes_read += len(contents)
        record, checksum = codec.decode(contents)
        if checksum != entry.checksum or record.name != entry.name:
            raise CorruptRecordError("another record than the one that was written")
        return record

    def _contents(self, entry: Entry) -> memoryview:
        """Raises OSError."""
        if self._reading is not None and self._begun and self._begun[0] == entry.name:
            self._begun.popleft()
            contents = next(self._reading)
        else:
            (contents,) = self._read([entry])
        if isinstance(contents, OSError):
            raise contents
        return contents

    def _read(self, entries: Sequence[Entry]) -> Generator[Contents]:
        """Reads each file and one byte more than there should be, if there is one."""
        paths = [self._shelf.path(entry.name) for entry in entries]
        return self._shelf.files.read_files(paths, [entry.size + 1 for entry in entries])
