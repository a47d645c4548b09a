"""Tokens of K and V as bytes, where arrays lie in the host's memory: copied once, from where they
lie to where they stay, which no operation of MLX does.

Planes are `[slots, kv_heads, places, width]`. They are computed, nothing that writes them is under
way, and the memory of one that is written to is nobody else's: MLX copies a shared array before it
writes, which is not done here.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, cast

import mlx.core as mx

from mlx_lm_server.native.memory import address_of, unwritten_bytes
from mlx_lm_server.runner.backend import CopyHeads

Move = tuple[int, int, int]  # from, to and length, in bytes


@dataclass(frozen=True, slots=True)
class Span:
    """Tokens of a slot of a plane: a slot of a slab, or a block of the pool."""

    slot: int
    start: int
    num_tokens: int


class PlaneCopies:
    """Copies tokens between planes and to bytes; with `copy_heads`, which is native code with
    threads, or here."""

    def __init__(self, copy_heads: CopyHeads | None) -> None:
        self._copy_heads = copy_heads

    def between(
        self, pairs: Iterable[tuple[mx.array, mx.array]], spans: Sequence[tuple[Span, Span]]
    ) -> None:
        """Copies in each pair of planes from the first span of each pair to the second. Raises
        ValueError where they do not fit each other."""
        alike: dict[tuple[_Layout, _Layout], list[tuple[mx.array, mx.array]]] = {}
        for source, target in pairs:
            alike.setdefault((_Layout.of(source), _Layout.of(target)), []).append((source, target))
        for (old, new), group in alike.items():
            if (old.kv_heads, old.token_bytes) != (new.kv_heads, new.token_bytes):
                raise ValueError(f"tokens of {old} do not fit {new}")
            if any(a.num_tokens != b.num_tokens for a, b in spans):
                raise ValueError("spans of different length")
            moves = [(old.start(a), new.start(b), a.num_tokens * old.token_bytes) for a, b in spans]
            sources = [bytes_of(source) for source, _ in group]
            targets = [_memory_of(target) for _, target in group]
            from_, to = list(map(address_of, sources)), list(map(address_of, targets))
            self._copy(from_, to, moves, old.kv_heads, old.head_bytes, new.head_bytes)

    def out(self, planes: Sequence[mx.array], spans: Sequence[Span]) -> list[memoryview]:
        """Returns for each span of planes of one shape the bytes of `[planes, kv_heads,
        num_tokens, width]`."""
        layout, views = _Layout.of(planes[0]), [bytes_of(plane) for plane in planes]
        from_ = list(map(address_of, views))
        copies = [unwritten_bytes(len(planes) * layout.plane_bytes(span)) for span in spans]
        pairs = zip(spans, copies, strict=True)
        for num_tokens, run in groupby(pairs, key=lambda pair: pair[0].num_tokens):
            alike, length = list(run), num_tokens * layout.token_bytes
            moves = [(layout.start(span), address_of(copy), length) for span, copy in alike]
            to = [number * layout.plane_bytes(alike[0][0]) for number in range(len(planes))]
            self._copy(from_, to, moves, layout.kv_heads, layout.head_bytes, length)
        return [copy.toreadonly() for copy in copies]

    def into(
        self,
        planes: Sequence[mx.array],
        spans: Sequence[Span],
        copies: Sequence[bytes | memoryview],
    ) -> None:
        """The way back. Raises ValueError where the bytes are not as many."""
        layout, views = _Layout.of(planes[0]), [_memory_of(plane) for plane in planes]
        to = list(map(address_of, views))
        pairs = [(span, memoryview(copy)) for span, copy in zip(spans, copies, strict=True)]
        if any(copy.nbytes != len(planes) * layout.plane_bytes(span) for span, copy in pairs):
            raise ValueError("bytes of other planes")
        for num_tokens, run in groupby(pairs, key=lambda pair: pair[0].num_tokens):
            alike, length = list(run), num_tokens * layout.token_bytes
            moves = [(address_of(copy), layout.start(span), length) for span, copy in alike]
            from_ = [number * layout.plane_bytes(alike[0][0]) for number in range(len(planes))]
            self._copy(from_, to, moves, layout.kv_heads, length, layout.head_bytes)

    def _copy(
        self,
        sources: Sequence[int],
        targets: Sequence[int],
        moves: Sequence[Move],
        num_heads: int,
        from_stride: int,
        to_stride: int,
    ) -> None:
        """What native/products/copies.c says, with its threads or here."""
        columns = list(zip(*moves, strict=True)) or [(), (), ()]
        if self._copy_heads is not None:
            arrays = len(sources), _longs(sources), _longs(targets)
            to_do = len(moves), *map(_longs, columns), num_heads, from_stride, to_stride
            if not self._copy_heads(*arrays, *to_do):
                raise ValueError(f"{len(moves)} moves of {num_heads} heads cannot be made")
            return
        for source, target in zip(sources, targets, strict=True):
            for from_, to, length in moves:
                for head in range(num_heads):
                    into = target + to + head * to_stride
                    ctypes.memmove(into, source + from_ + head * from_stride, length)


def bytes_of(array: mx.array) -> memoryview:
    """The elements of an array in order; of one that is computed, where they lie."""
    if not array.size:
        return memoryview(b"")
    view = memoryview(cast(Any, array))  # a buffer, which its types do not say
    return (view if view.c_contiguous else memoryview(cast(Any, mx.contiguous(array)))).cast("B")


def _memory_of(array: mx.array) -> memoryview:
    """The memory of an array itself. Raises TypeError where that is not in order."""
    return memoryview(cast(Any, array)).cast("B") if array.size else memoryview(b"")


@dataclass(frozen=True, slots=True)
class _Layout:
    num_slots: int
    kv_heads: int
    places: int
    token_bytes: int

    @classmethod
    def of(cls, plane: mx.array) -> _Layout:
        num_slots, kv_heads, places, width = plane.shape
        return cls(num_slots, kv_heads, places, width * plane.itemsize)

    @property
    def head_bytes(self) -> int:
        return self.places * self.token_bytes

    def plane_bytes(self, span: Span) -> int:
        """What the span takes in all heads."""
        return self.kv_heads * span.num_tokens * self.token_bytes

    def start(self, span: Span) -> int:
        """Where the span begins in its first head; the others follow in steps of `head_bytes`."""
        stop = span.start + span.num_tokens
        if not (0 <= span.slot < self.num_slots and 0 <= span.start <= stop <= self.places):
            raise ValueError(f"{span} is outside of {self}")
        return span.slot * self.kv_heads * self.head_bytes + span.start * self.token_bytes


def _longs(numbers: Sequence[int]) -> ctypes.Array[ctypes.c_long]:
    return (ctypes.c_long * len(numbers))(*numbers)
