"""Blocks: a fixed number of tokens with a name that stands for all tokens up to their end.

    tokens   │ 0 … 15 │ 16 … 31 │ 32 … 47 │ 48 … 52
    names     a ─────▶ b ──────▶ c ──────▶ t            name = sha256(parent's name, own tokens)

The root's name holds what else must be equal (the salt of a request; on disk the model and the
layout of its memory). Equal names mean equal state of all layers that keep every token; a hit is
checked against the token ids all the same.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple


def root_name(*extra_keys: str) -> bytes:
    """The parent of first blocks."""
    return hashlib.sha256("\x1f".join(extra_keys).encode()).digest()


def chain_name(parent: bytes, token_ids: Sequence[int]) -> bytes:
    return hashlib.sha256(parent + array("I", token_ids).tobytes()).digest()


class Place(NamedTuple):
    """Where in the pool a block lies."""

    segment_id: int
    number: int


@dataclass(slots=True, eq=False)
class Block:
    """Its bytes lie in the pool (`place`), or in the rows that hold it, or both: a row that was
    given a pool's block has a copy of its own to go on from. Blocks with fewer tokens than the
    others are the ends of finished sequences."""

    name: bytes
    parent: bytes
    token_ids: tuple[int, ...]
    num_tokens: int  # up to its end
    place: Place | None = None
    rows: dict[int, None] = field(default_factory=dict)  # an ordered set


@dataclass(slots=True, eq=False)
class State:
    """A checkpoint of what does not lie in blocks (recurrent state, windows), taken after
    `num_tokens` tokens: those of the chain up to `parent`, and `tail`."""

    state_id: int
    parent: bytes
    tail: tuple[int, ...]
    num_tokens: int
    num_bytes: int


def num_common(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens two sequences begin with alike."""
    count = 0
    for x, y in zip(a, b, strict=False):
        if x != y:
            break
        count += 1
    return count
