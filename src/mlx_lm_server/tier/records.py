"""What the disk tier stores and what it gives back."""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import sha256
from math import prod
from typing import Literal

Kind = Literal["block", "state"]
NAME_BYTES = 32

# Bits of one element, by dtype as safetensors spells it.
DTYPE_BITS = {
    "BOOL": 8,
    "U8": 8,
    "I8": 8,
    "F8_E4M3": 8,
    "F8_E5M2": 8,
    "U16": 16,
    "I16": 16,
    "F16": 16,
    "BF16": 16,
    "U32": 32,
    "I32": 32,
    "F32": 32,
    "U64": 64,
    "I64": 64,
    "F64": 64,
    "C64": 64,
}


def state_name(chain_name: bytes) -> bytes:
    """Returns what a state is stored as: a block that ends at the same token has the chain's own
    name."""
    return sha256(b"state" + chain_name).digest()


@dataclass(frozen=True, slots=True)
class Tensor:
    """One array as bytes.

    `dtype` is in safetensors' words (`F32`, `BF16`, `U32`, …). `data` is C-contiguous, and nobody
    writes to it any more. An array that numpy can hold is given as `array.data`.
    """

    dtype: str
    shape: tuple[int, ...]
    data: bytes | memoryview

    @property
    def nbytes(self) -> int:
        return memoryview(self.data).nbytes

    @property
    def is_consistent(self) -> bool:
        """Whether the bytes are as many as dtype and shape say."""
        bits = DTYPE_BITS.get(self.dtype, 0)
        return bits > 0 and self.nbytes * 8 == prod(self.shape) * bits


@dataclass(frozen=True, slots=True)
class Record:
    """A block of tokens' K and V, or the state at a token.

    `name` is the block's chain hash, or `state_name` of the hash at the state's token. `parent` is
    the name of the block before it; at a sequence's start one that is never stored. `token_ids` are
    the record's own ids, `num_tokens` is the length of the prefix that it ends.
    """

    name: bytes
    kind: Kind
    parent: bytes
    token_ids: tuple[int, ...]
    num_tokens: int
    tensors: tuple[Tensor, ...]

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)


@dataclass(frozen=True, slots=True)
class Wanted:
    """A record to read. What is stored under the name but has other ids counts as absent."""

    name: bytes
    token_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Ticket:
    """A read that is on its way; `SsdStore.poll` gives it back with what was read."""

    number: int
    owner: str


@dataclass(frozen=True, slots=True)
class Prefetched:
    """The records up to the first that could not be read, in the order in which they were asked.

    Fewer than were asked for is a shorter prefix, and nothing else.
    """

    ticket: Ticket
    records: tuple[Record, ...]
    read_s: float
