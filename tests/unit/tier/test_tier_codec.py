"""Records as bytes: what comes back is what went in, or nothing."""

from __future__ import annotations

from dataclasses import replace
from random import Random

import msgspec
import pytest
import safetensors
from tier_fakes import as_bytes, make_record

from mlx_lm_server.native.memory import PAGE_BYTES, SECTOR_BYTES
from mlx_lm_server.tier import Tensor
from mlx_lm_server.tier.codec import (
    FILE_VERSION,
    LARGE_RECORD_BYTES,
    CorruptRecordError,
    decode,
    encode,
    read_header,
)


def encoded(record: object) -> bytes:
    return b"".join(encode(record).pieces)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["block", "state"])
def test_a_record_comes_back_as_it_was(kind: str) -> None:
    record = make_record(1, kind=kind)
    back, checksum = decode(encoded(record))
    assert as_bytes(back) == as_bytes(record)
    assert checksum == encode(record).checksum


def test_quantised_tensors_empty_ones_and_tails_come_back() -> None:
    tensors = (
        Tensor("U32", (2, 3), bytes(range(24))),
        Tensor("BF16", (2, 0), b""),
        Tensor("BF16", (2, 3), memoryview(bytes(12))),
        Tensor("I8", (3,), b"abc"),
    )
    record = replace(make_record(2), token_ids=(7,), num_tokens=33, tensors=tensors)
    back, _ = decode(encoded(record))
    assert as_bytes(back) == as_bytes(record)


def test_safetensors_reads_our_files() -> None:
    record = make_record(3)
    read = dict(safetensors.deserialize(encoded(record)))
    for i, tensor in enumerate(record.tensors):
        there = read[str(i)]
        assert (there["dtype"], tuple(there["shape"])) == (tensor.dtype, tensor.shape)
        assert bytes(there["data"]) == tensor.data


@pytest.mark.parametrize(("nbytes", "cut"), [(64, SECTOR_BYTES), (LARGE_RECORD_BYTES, PAGE_BYTES)])
@pytest.mark.parametrize("num_ids", [1, 16, 100])
def test_the_data_begin_where_a_direct_write_may(nbytes: int, cut: int, num_ids: int) -> None:
    record = replace(make_record(3, nbytes=nbytes), token_ids=tuple(range(num_ids)))
    header, *_ = encode(record).pieces
    assert header.nbytes % cut == 0
    assert header.nbytes < cut + 1200, "and no more is padded"


def test_decoding_copies_no_tensor() -> None:
    contents = encoded(make_record(4))
    record, _ = decode(contents)
    assert all(memoryview(tensor.data).obj is contents for tensor in record.tensors)


def test_every_flipped_bit_is_noticed() -> None:
    contents = encoded(make_record(5, nbytes=64))
    for at in range(len(contents)):
        flipped = bytearray(contents)
        flipped[at] ^= 1 << (at % 8)
        with pytest.raises(CorruptRecordError):
            decode(bytes(flipped))


def test_every_torn_file_is_noticed() -> None:
    contents = encoded(make_record(6, nbytes=64))
    for length in range(len(contents)):
        with pytest.raises(CorruptRecordError):
            decode(contents[:length])
    with pytest.raises(CorruptRecordError):
        decode(contents + b"\0")


def test_any_bytes_are_refused_without_another_error() -> None:
    random = Random(7)
    start = encoded(make_record(7))[8:40]
    for _ in range(2000):
        body = start + random.randbytes(random.randrange(80))
        with pytest.raises(CorruptRecordError):
            decode(len(body).to_bytes(8, "little") + body)
    deep = start + b"[" * 200_000
    with pytest.raises(CorruptRecordError):
        read_header(len(deep).to_bytes(8, "little") + deep)


def test_another_version_is_refused() -> None:
    ours = f'"version":"{FILE_VERSION}"'.encode()
    contents = encoded(make_record(8))
    assert ours in contents
    contents = contents.replace(ours, b'"version":"0"')
    with pytest.raises(CorruptRecordError, match="version"):
        decode(contents)


def test_the_header_alone_says_how_long_the_file_is() -> None:
    contents = encoded(make_record(9))
    header = read_header(contents[:700])
    assert header.file_bytes == len(contents)
    about = msgspec.json.decode(contents[8 : contents.index(b"}}") + 2])
    assert about["__metadata__"]["name"] == header.name.hex()


def test_a_tensor_knows_whether_bytes_and_shape_agree() -> None:
    assert Tensor("F16", (3,), bytes(6)).is_consistent
    assert not Tensor("F16", (3,), bytes(5)).is_consistent
    assert not Tensor("float16", (3,), bytes(6)).is_consistent
