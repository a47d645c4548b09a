"""What the core asks of a tier: storage of blocks and checkpoints that outlives the process.

A tier may lose or refuse anything at any time; what it gives back was checked against name and
token ids. Blocks have the same names in memory and in the tier, checkpoints names of their own.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import Protocol

import msgspec

from mlx_lm_server.core.block import Block, State, chain_name


class Label(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """What a record in the tier holds: K and V of a block's tokens, or the state after them.
    `token_ids` are the record's own, `num_tokens` counts all from the first of the sequence."""

    name: bytes
    parent: bytes
    token_ids: tuple[int, ...]
    num_tokens: int
    is_state: bool = False

    @classmethod
    def of(cls, entry: Block | State) -> Label:
        if isinstance(entry, State):
            return cls.of_state(entry.parent, entry.tail, entry.num_tokens)
        return cls(entry.name, entry.parent, entry.token_ids, entry.num_tokens)

    @classmethod
    def of_state(cls, parent: bytes, tail: tuple[int, ...], num_tokens: int) -> Label:
        name = hashlib.sha256(b"state" + chain_name(parent, tail)).digest()
        return cls(name, parent, tail, num_tokens, is_state=True)


class Tier(Protocol):
    """Asked on the engine's thread; no call waits for a disk."""

    @property
    def writes_through(self) -> bool:
        """Whether what is kept in memory is stored too, not only what leaves it."""

    def look(self) -> None:
        """Take in what is new; before a request is looked up, since an idle engine does not
        `poll`."""

    def has(self, name: bytes) -> bool:
        """As far as is known; reading it may still find nothing."""

    def has_room(self, num_bytes: int) -> bool:
        """Whether it would take so many bytes now."""

    def note_refused(self) -> None:
        """Something was not stored for want of room."""

    def size_of(self, name: bytes) -> int:
        """Bytes that reading it would move."""

    def read_forecast_s(self, names: Iterable[bytes]) -> float:
        """How long reading these would take now."""

    def fetch(self, labels: Sequence[Label]) -> int:
        """Begin to read these, in this order; gives the number of the read."""

    def cancel(self, read: int) -> None:
        """Forget a read."""

    def poll(self) -> list[tuple[int, int]]:
        """Returns the reads that have ended, each with how many of its records it found: all that
        were asked for, or the first ones. The runner may take them, by their names, until the
        next call."""

    def use(self, names: Sequence[bytes]) -> None:
        """These were used from memory, so they are worth keeping."""


class NoTier:
    """Stores nothing."""

    writes_through = False

    def look(self) -> None:
        pass

    def has(self, name: bytes) -> bool:
        return False

    def has_room(self, num_bytes: int) -> bool:
        return False

    def note_refused(self) -> None:
        pass

    def size_of(self, name: bytes) -> int:
        return 0

    def read_forecast_s(self, names: Iterable[bytes]) -> float:
        return 0.0

    def fetch(self, labels: Sequence[Label]) -> int:
        raise AssertionError("there is nothing to read")

    def cancel(self, read: int) -> None:
        pass

    def poll(self) -> list[tuple[int, int]]:
        return []

    def use(self, names: Sequence[bytes]) -> None:
        pass
