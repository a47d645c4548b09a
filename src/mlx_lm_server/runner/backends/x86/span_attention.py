"""Attention in C, for x86 CPUs in float32: `native/products/attention.c`.

It reads K and V where they lie in their slabs, for any tokens of a batch at once: single ones of
decode rows and chunks of prompts. Those of the tokens themselves it puts there first, where they
come with the queries. It travels as a product (native_products.py, docs/adr/0008): the matrices on
the left and on the right are the slabs' K and V, posing; what is added to the product are the
queries, with what the code in C is to know before them, and the new K and V after them.
"""

from __future__ import annotations

import ctypes
import functools
from array import array
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import mlx.core as mx

from mlx_lm_server import native
from mlx_lm_server.runner.backends.x86 import native_products
from mlx_lm_server.runner.state.step_layout import Span


class Facts(NamedTuple):
    """What is common to all rows, as native/products/told.h has it; that says what each is."""

    num_spans: int
    num_slots: int
    kv_heads: int
    capacity: int
    key_dim: int
    value_dim: int
    share: int
    window: int
    sinks_at: int
    first_row: int
    num_tokens: int
    has_new: int
    scale: int  # its bits, in float32


# Gives the rows `told` makes of some spans, of these facts and this width.
Tell = Callable[[tuple[int, ...], int], mx.array]


class Part(NamedTuple):
    """K and V `[slots, kv_heads, places, dim]`, and the tokens that see some of them."""

    keys: mx.array
    values: mx.array
    spans: tuple[Span, ...]
    tell: Tell | None = None  # where the rows of `told` are kept for other layers


@functools.cache
def is_there() -> bool:
    """Returns whether the library is there and takes what it is told for what it is."""
    library = native_products.library()
    return library is not None and knows_fields(library)


def knows_fields(library: ctypes.CDLL) -> bool:
    """Returns whether facts and spans have the same fields, in the same order, there and here."""
    names = *Facts._fields, "/", *Span._fields
    return native.text_in(library, "attention_fields") == "".join(f"{name} " for name in names)


def can_attend(q: mx.array, k: mx.array, v: mx.array) -> bool:
    return q.dtype == k.dtype == v.dtype == mx.float32


def attend(
    queries: mx.array,
    parts: Sequence[Part],
    scale: float,
    window: int | None = None,
    sinks: mx.array | None = None,
    new: tuple[mx.array, mx.array] | None = None,
) -> mx.array:
    """Queries `[T, heads, …, key_dim]` → `[T, heads, …, value_dim]`, of the tokens in some part. A
    token sees its slot up to its own place, no more than the last `window` tokens; `sinks`
    `[heads]` are logits of keys without a value.

    `new` are K and V `[T, kv_heads, …, dim]` of all tokens. They are written to the memory of the
    parts' arrays, which MLX does not know: whoever reads those arrays must do so after the result,
    and nobody else may share their memory. Without `new` the tokens' K and V are there already.
    """
    num_tokens, heads = queries.shape[:2]
    value_dim = parts[0].values.shape[-1]
    width = max(queries.shape[-1], value_dim)
    rows = [_rows(array, width) for array in (queries, *(new or ()))]
    what = num_tokens, heads, new is not None
    for part in parts:
        rows = [_attend_part(rows, what, part, scale, window, sinks)]
    out = rows[0]
    if len(out) > num_tokens * heads or width > value_dim:
        out = out[: num_tokens * heads, :value_dim]
    return out.reshape(*queries.shape[:-1], value_dim).astype(queries.dtype)


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


def _rows(array: mx.array, width: int) -> mx.array:
    dim = array.shape[-1]
    rows = array.reshape(-1, dim)
    return mx.pad(rows, [(0, 0), (0, width - dim)]) if dim < width else rows


def _attend_part(
    rows: Sequence[mx.array],
    what: tuple[int, int, bool],
    part: Part,
    scale: float,
    window: int | None,
    sinks: mx.array | None,
) -> mx.array:
    """Rows `[T * heads, width]`, those of the part's tokens replaced by what they saw, and behind
    them those of new K and then V, if any, `[T * kv_heads, width]` each. `what` the rows are says
    T, heads, and whether there are such."""
    num_tokens, heads, has_new = what
    num_slots, kv_heads, capacity, key_dim = part.keys.shape
    value_dim, width = part.values.shape[-1], rows[0].shape[1]
    first_row, sinks_at, before = _num_rows(part.spans, width), 0, []
    if sinks is not None:
        padding = -heads % width
        before.append(mx.pad(sinks.astype(mx.float32), (0, padding)).reshape(-1, width))
        sinks_at = first_row * width
        first_row += before[0].shape[0]
    facts = Facts(
        num_spans=len(part.spans),
        num_slots=num_slots,
        kv_heads=kv_heads,
        capacity=capacity,
        key_dim=key_dim,
        value_dim=value_dim,
        share=heads // kv_heads,
        window=window or 0,
        sinks_at=sinks_at,
        first_row=first_row,
        num_tokens=num_tokens,
        has_new=int(has_new),
        scale=native_products.bits_of(scale),
    )
    tell = part.tell or partial(told, part.spans)
    added = mx.concatenate([tell(facts, width), *before, *rows])
    depth = native_products.POSING_DEPTH
    out = native_products.run(
        native_products.posing(part.keys, len(added), depth),
        native_products.posing(part.values, depth, width),
        native_products.ATTENTION_ALPHA,
        added,
    )
    return out[first_row:]


def told(spans: Sequence[Span], facts: tuple[int, ...], width: int) -> mx.array:
    """The numbers that the code in C reads first, in rows of `width`."""
    numbers = array("i", facts)
    for span in spans:
        numbers.extend(span)
    numbers.extend([0] * (-len(numbers) % width))
    rows = memoryview(numbers).cast("B").cast("f", (len(numbers) // width, width))
    return mx.array(rows)  # type: ignore[arg-type]  # it takes any buffer


def _num_rows(spans: Sequence[Span], width: int) -> int:
    return -(-(len(Facts._fields) + len(spans) * len(Span._fields)) // width)
