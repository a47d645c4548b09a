"""Reads records back and believes nothing: size, checksum, name and token ids must be right."""

from __future__ import annotations

import errno
import logging
from collections.abc import Sequence
from contextlib import suppress

from mlx_lm_server.tier import codec
from mlx_lm_server.tier.codec import CorruptRecordError
from mlx_lm_server.tier.entries import Entry
from mlx_lm_server.tier.files import read_file
from mlx_lm_server.tier.jobs import LoadJob
from mlx_lm_server.tier.records import Record, Wanted
from mlx_lm_server.tier.shelf import Shelf

OUT_OF_HANDLES = (errno.EMFILE, errno.ENFILE)  # says nothing about the file

log = logging.getLogger(__name__)


class RecordReader:
    """Owned by the io side."""

    def __init__(self, shelf: Shelf) -> None:
        self._shelf = shelf

    def announce(self, job: LoadJob, wanted: Sequence[Wanted]) -> None:
        """These come soon. What is wrong with them is for `read` to find."""
        for each in wanted:
            if each.name not in job.at_hand and self._shelf.index.get(each.name) is not None:
                with suppress(OSError):
                    self._shelf.files.announce(self._shelf.path(each.name))

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
        contents = read_file(self._shelf.files, self._shelf.path(entry.name), entry.size + 1)
        self._shelf.counters.bytes_read += len(contents)
        record, checksum = codec.decode(contents)
        if checksum != entry.checksum or record.name != entry.name:
            raise CorruptRecordError("another record than the one that was written")
        return record
