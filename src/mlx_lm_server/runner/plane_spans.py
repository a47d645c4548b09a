"""Tokens of K and V as bytes, where arrays lie in the host's memory: copied once, from where they
lie to where they stay, which no operation of MLX does.

Arrays `[slots, kv_heads, places, width]` are computed, and nothing that writes them is under way.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import mlx.core as mx


@dataclass(frozen=True, slots=True)
class Span:
    """Tokens of a slot of a plane: a slot of a slab, or a block of the pool."""

    slot: int
    start: int
    num_tokens: int


def runs_of(span: Span, plane: mx.array) -> tuple[range, int]:
    """Where in bytes the span of each KV head begins, and how long it is."""
    _, kv_heads, places, width = plane.shape
    token_bytes = width * plane.itemsize
    head_bytes = places * token_bytes
    first = span.slot * kv_heads * head_bytes + span.start * token_bytes
    return range(first, first + kv_heads * head_bytes, head_bytes), span.num_tokens * token_bytes


def bytes_of(array: mx.array) -> memoryview:
    """The elements of an array in order; of one that is computed, where they lie."""
    if not array.size:
        return memoryview(b"")
    view = memoryview(cast(Any, array))  # a buffer, which its types do not say
    return (view if view.c_contiguous else memoryview(cast(Any, mx.contiguous(array)))).cast("B")


def written_bytes(array: mx.array) -> memoryview:
    """The memory of an array itself."""
    return memoryview(cast(Any, array)).cast("B")


def copy_between(
    sources: Sequence[mx.array], targets: Sequence[mx.array], spans: Iterable[tuple[Span, Span]]
) -> None:
    """From the first span of each pair to the second, from each source to the target beside it;
    sources have one shape, and so have targets."""
    runs = []
    for source_span, target_span in spans:
        from_heads, length = runs_of(source_span, sources[0])
        to_heads, _ = runs_of(target_span, targets[0])
        runs += [(a, b, length) for a, b in zip(from_heads, to_heads, strict=True)]
    for source, target in zip(map(bytes_of, sources), map(written_bytes, targets), strict=True):
        for a, b, length in runs:
            target[b : b + length] = source[a : a + length]
