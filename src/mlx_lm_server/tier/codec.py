"""Record ↔ bytes of a safetensors file.

    8 bytes   length of the header, little endian
    header    {"__metadata__":{"checksum":"…","name":"…",…},"0":{"dtype":…},…}, and spaces
    data      the tensors, in the record's order, without gaps; it begins at a sector or at a
              page, so that it can be written from where it lies

The checksum covers every byte of the file but its own digits, which count as zeros. Encoding makes
no copy of the tensors, and neither does decoding, which safetensors' own Python functions do not
offer; a test reads these files with safetensors itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
from xxhash import xxh3_128

from mlx_lm_server.native.memory import PAGE_BYTES, SECTOR_BYTES
from mlx_lm_server.tier.records import DTYPE_BITS, NAME_BYTES, Kind, Record, Tensor

FILE_VERSION = "3"
CHECKSUM_BYTES = 16
MAX_HEADER_BYTES = 1 << 20
LENGTH_BYTES = 8
# From here on a whole page for the header is next to nothing.
LARGE_RECORD_BYTES = 32 * PAGE_BYTES
_START = b'{"__metadata__":{"checksum":"'
_CHECKSUM = slice(len(_START), len(_START) + 2 * CHECKSUM_BYTES)
_NO_CHECKSUM = b"0" * (2 * CHECKSUM_BYTES)


class CorruptRecordError(Exception):
    """The bytes are no record that this version wrote."""


class _Metadata(msgspec.Struct):
    checksum: str
    version: str
    name: str
    kind: Kind
    parent: str
    token_ids: str
    num_tokens: str


class _TensorEntry(msgspec.Struct):
    dtype: str
    shape: tuple[int, ...]
    data_offsets: tuple[int, int]


@dataclass(frozen=True, slots=True)
class EncodedRecord:
    """A file's bytes in pieces, ready for one gathering write."""

    pieces: tuple[memoryview, ...]
    checksum: bytes

    @property
    def nbytes(self) -> int:
        return sum(piece.nbytes for piece in self.pieces)


@dataclass(frozen=True, slots=True)
class RecordHeader:
    """What the head of a file says; nothing of it is verified against the data yet."""

    name: bytes
    kind: Kind
    parent: bytes
    token_ids: tuple[int, ...]
    num_tokens: int
    checksum: bytes
    file_bytes: int
    tensors: tuple[tuple[str, tuple[int, ...], int, int], ...]  # dtype, shape, start, end in file


def encode(record: Record) -> EncodedRecord:
    """Returns the file's bytes, in which the tensors' are not copies."""
    data = [memoryview(tensor.data).cast("B") for tensor in record.tensors if tensor.nbytes]
    header = bytearray(_header(record))
    checksum = _checksum(header, data)
    at = slice(LENGTH_BYTES + _CHECKSUM.start, LENGTH_BYTES + _CHECKSUM.stop)
    header[at] = checksum.hex().encode()
    return EncodedRecord((memoryview(header), *data), checksum)


def decode(contents: bytes | memoryview) -> tuple[Record, bytes]:
    """Returns the record, whose tensors are views of `contents`, and the file's checksum.

    Raises CorruptRecordError.
    """
    header = read_header(contents)
    if header.file_bytes != len(contents):
        raise CorruptRecordError(f"{len(contents)} bytes instead of {header.file_bytes}")
    whole = memoryview(contents)
    start = LENGTH_BYTES + int.from_bytes(contents[:LENGTH_BYTES], "little")
    head = bytearray(whole[:start])
    head[LENGTH_BYTES + _CHECKSUM.start : LENGTH_BYTES + _CHECKSUM.stop] = _NO_CHECKSUM
    if _checksum(head, [whole[start:]]) != header.checksum:
        raise CorruptRecordError("the checksum is another")
    tensors = tuple(
        Tensor(dtype, shape, whole[first:last]) for dtype, shape, first, last in header.tensors
    )
    if not all(tensor.is_consistent for tensor in tensors):
        raise CorruptRecordError("a tensor's bytes do not fit its shape")
    record = Record(
        header.name, header.kind, header.parent, header.token_ids, header.num_tokens, tensors
    )
    return record, header.checksum


def read_header(head: bytes | memoryview) -> RecordHeader:
    """Returns what a file's first bytes say. Raises CorruptRecordError, also where they are too
    few."""
    if (start := header_end(head)) is None or start > len(head):
        raise CorruptRecordError("no whole header")
    text = bytes(head[LENGTH_BYTES:start])
    if not text.startswith(_START):
        raise CorruptRecordError("not written by this server")
    try:
        entries = msgspec.json.decode(text, type=dict[str, Any])
        about = msgspec.convert(entries.pop("__metadata__"), _Metadata)
        tensors = msgspec.convert(list(entries.values()), list[_TensorEntry])
        if about.version != FILE_VERSION:
            raise CorruptRecordError(f"version {about.version}")
        return _parsed(about, tensors, start)
    except (ValueError, KeyError, RecursionError, msgspec.DecodeError) as error:
        raise CorruptRecordError(str(error)) from error


def header_end(head: bytes | memoryview) -> int | None:
    """Returns where the data starts, or None where that cannot be a header of ours."""
    if len(head) < LENGTH_BYTES:
        return None
    length = int.from_bytes(head[:LENGTH_BYTES], "little")
    return LENGTH_BYTES + length if length <= MAX_HEADER_BYTES else None


def _header(record: Record) -> bytes:
    about = {
        "checksum": _NO_CHECKSUM.decode(),
        "version": FILE_VERSION,
        "name": record.name.hex(),
        "kind": record.kind,
        "parent": record.parent.hex(),
        "token_ids": " ".join(map(str, record.token_ids)),
        "num_tokens": str(record.num_tokens),
    }
    entries: dict[str, Any] = {"__metadata__": about}
    offset = 0
    for i, tensor in enumerate(record.tensors):
        end = offset + tensor.nbytes
        entries[str(i)] = {
            "dtype": tensor.dtype,
            "shape": tensor.shape,
            "data_offsets": (offset, end),
        }
        offset = end
    text = msgspec.json.encode(entries)
    cut = PAGE_BYTES if offset >= LARGE_RECORD_BYTES else SECTOR_BYTES
    text += b" " * (-(LENGTH_BYTES + len(text)) % cut)
    return len(text).to_bytes(LENGTH_BYTES, "little") + text


def _parsed(about: _Metadata, entries: list[_TensorEntry], start: int) -> RecordHeader:
    name, parent = bytes.fromhex(about.name), bytes.fromhex(about.parent)
    checksum = bytes.fromhex(about.checksum)
    if len(name) != NAME_BYTES or checksum.hex() != about.checksum:
        raise CorruptRecordError("a name or checksum in other letters")
    end = 0
    tensors = []
    for entry in entries:
        first, last = entry.data_offsets
        if first != end or last < first or entry.dtype not in DTYPE_BITS:
            raise CorruptRecordError("tensors with gaps")
        end = last
        tensors.append((entry.dtype, entry.shape, start + first, start + last))
    return RecordHeader(
        name=name,
        kind=about.kind,
        parent=parent,
        token_ids=tuple(map(int, about.token_ids.split())),
        num_tokens=int(about.num_tokens),
        checksum=checksum,
        file_bytes=start + end,
        tensors=tuple(tensors),
    )


def _checksum(header: bytearray, data: Sequence[memoryview]) -> bytes:
    digest = xxh3_128(header)
    for piece in data:
        digest.update(piece)
    return digest.digest()
