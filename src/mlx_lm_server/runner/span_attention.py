"""Attention in C, for x86 CPUs in float32: `native/products/attention.c`.

It reads K and V where they lie in their slabs, for any tokens of a batch at once: single ones of
decode rows and chunks of prompts. It travels as a product (native_products.py, docs/adr/0008): the
matrices on the left and on the right are K and V, posing; what is added to the product are the
queries, with what the code in C is to know before them.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import NamedTuple

import mlx.core as mx

from mlx_lm_server.runner import native_products


class Span(NamedTuple):
    """Tokens side by side in the batch and in a slot, the first of them after `start` others. A
    single one may look back around the end of its slot, which is a ring then."""

    slot: int
    first_token: int
    num_tokens: int
    start: int


# Gives the rows `told` makes of some spans, of these facts and this width.
Tell = Callable[[tuple[int, ...], int], mx.array]


class Part(NamedTuple):
    """K and V `[slots, kv_heads, places, dim]`, and the tokens that see some of them."""

    keys: mx.array
    values: mx.array
    spans: tuple[Span, ...]
    tell: Tell | None = None  # where the rows of `told` are kept for other layers


def can_attend(q: mx.array, k: mx.array, v: mx.array) -> bool:
    return q.dtype == k.dtype == v.dtype == mx.float32


def attend(
    queries: mx.array,
    parts: Iterable[Part],
    scale: float,
    window: int | None = None,
    sinks: mx.array | None = None,
) -> mx.array:
    """Queries `[T, heads, …, key_dim]` → `[T, heads, …, value_dim]`, of the tokens in some part. A
    token sees its slot up to its own place, no more than the last `window` tokens; `sinks`
    `[heads]` are logits of keys without a value."""
    heads, key_dim = queries.shape[1], queries.shape[-1]
    rows, value_dim = queries.reshape(-1, key_dim), key_dim
    for part in parts:
        value_dim = part.values.shape[-1]
        if value_dim > rows.shape[1]:
            rows = mx.pad(rows, [(0, 0), (0, value_dim - rows.shape[1])])
        rows = _attend_part(rows, heads, part, scale, window, sinks)
    if rows.shape[1] > value_dim:
        rows = rows[:, :value_dim]
    return rows.reshape(*queries.shape[:-1], value_dim).astype(queries.dtype)


def attend_chunk(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    scale: float,
    start: int,
    window: int | None = None,
    sinks: mx.array | None = None,
) -> mx.array:
    """`AttentionKernel.chunk`."""
    part = Part(k[None], v[None], (Span(0, 0, q.shape[1], start),))
    return attend(q.swapaxes(0, 1), [part], scale, window, sinks).swapaxes(0, 1)


def _attend_part(
    rows: mx.array,
    heads: int,
    part: Part,
    scale: float,
    window: int | None,
    sinks: mx.array | None,
) -> mx.array:
    """Rows `[T * heads, width]`, those of the part's tokens replaced by what they saw."""
    _, kv_heads, capacity, key_dim = part.keys.shape
    value_dim, width = part.values.shape[-1], rows.shape[1]
    facts = [len(part.spans), kv_heads, heads // kv_heads, key_dim, value_dim, capacity]
    facts += [window or 0, 0, 0, native_products.bits_of(scale)]
    num_rows = _num_rows(part.spans, facts, width)
    added = [rows]
    if sinks is not None:
        padding = -heads % width
        added.insert(0, mx.pad(sinks.astype(mx.float32), (0, padding)).reshape(-1, width))
        facts[7] = num_rows * width
        num_rows += added[0].shape[0]
    facts[8] = num_rows
    tell = part.tell or partial(told, part.spans)
    out = native_products.run(
        mx.as_strided(part.keys, (num_rows + rows.shape[0], 8), (8, 1)),
        mx.as_strided(part.values, (8, width), (width, 1)),
        native_products.ATTENTION_ALPHA,
        mx.concatenate([tell(tuple(facts), width), *added]),
    )
    return out[num_rows:]


def told(spans: Sequence[Span], facts: tuple[int, ...], width: int) -> mx.array:
    """The numbers that the code in C reads first, in rows of `width`."""
    numbers = array("i", facts)
    for span in spans:
        numbers.extend(span)
    numbers.extend([0] * (-len(numbers) % width))
    rows = memoryview(numbers).cast("B").cast("f", (len(numbers) // width, width))
    return mx.array(rows)  # type: ignore[arg-type]  # it takes any buffer


def _num_rows(spans: Sequence[Span], facts: Sequence[int], width: int) -> int:
    return -(-(len(facts) + len(spans) * len(Span._fields)) // width)
