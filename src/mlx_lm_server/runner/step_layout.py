"""How one forward's packed tokens map to slabs: computed once a step, used by every layer.

A forward gets all its tokens as one packed batch `[T, 1]`: first the decode rows, then the
prefill chunks, each chunk's tokens side by side.

    token   0   1   2   3   4 │ 5   6   7   8   9  10 │ 11  12
            ───────────────── │ ───────────────────── │ ──────
            decode rows       │ chunk of row 8        │ chunk of row 2
            slab 1    slab 4  │ positions 64 … 69     │ positions 0, 1
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import groupby

import mlx.core as mx

from mlx_lm_server.core.plan import DecodeRow, PrefillChunk, StepPlan
from mlx_lm_server.runner.span_attention import Span

# Lengths of the KV read by decode rows are rounded up to this many tokens, so that the same
# shapes (and compiled functions) serve many steps.
LENGTH_STEP = 32


@dataclass(frozen=True, slots=True)
class DecodeGroup:
    """The decode rows of one slab.

    Plain operations run over the slab's first `num_slots` slots and `length` positions; attention
    in C takes the `spans`. `queries` maps slots to tokens and `answers` tokens to slots; both are
    None where they are the same, which they are unless a row of the slab sits this step out.
    """

    slab_id: int
    first_token: int
    num_tokens: int
    num_slots: int
    length: int
    visible: mx.array | None  # [num_slots, 1, 1, length] bool; None where every position is
    bias: mx.array | None  # the same as 0 and -inf in float32, for the CPU
    queries: mx.array | None
    answers: mx.array | None
    last_positions: tuple[int, ...]  # of each slot; -1 where it sits this step out

    @property
    def tokens(self) -> slice:
        return slice(self.first_token, self.first_token + self.num_tokens)

    @property
    def spans(self) -> tuple[Span, ...]:
        places = [(slot, last) for slot, last in enumerate(self.last_positions) if last >= 0]
        return tuple(
            Span(slot, self.first_token + i, 1, last) for i, (slot, last) in enumerate(places)
        )


@dataclass(frozen=True, slots=True)
class WindowView:
    """What the slots of a decode group see through a window, in a ring or in a whole slab."""

    length: int
    visible: mx.array | None
    bias: mx.array | None


@dataclass(frozen=True, slots=True)
class ChunkSpan:
    """One row's prefill chunk: tokens `first_token …`, KV positions `start … start + length`."""

    slab_id: int
    slot: int
    first_token: int
    num_tokens: int
    start: int

    @property
    def tokens(self) -> slice:
        return slice(self.first_token, self.first_token + self.num_tokens)

    @property
    def end(self) -> int:
        return self.start + self.num_tokens

    @property
    def span(self) -> Span:
        return Span(self.slot, self.first_token, self.num_tokens, self.start)


@dataclass(frozen=True, slots=True)
class StepLayout:
    """What layers of a kind have in common is computed for the first and kept for the others."""

    num_tokens: int
    offsets: mx.array  # [T] int32: each token's position, as RoPE wants it
    decodes: tuple[DecodeGroup, ...]
    chunks: tuple[ChunkSpan, ...]
    with_bias: bool = False
    _views: dict[tuple[int, int, int | None], WindowView] = field(default_factory=dict)
    _places: dict[tuple[int, int, int], mx.array] = field(default_factory=dict)
    _spans: dict[bool, dict[int, tuple[Span, ...]]] = field(default_factory=dict)

    @property
    def ends(self) -> mx.array:
        return self.offsets + 1

    def spans(self, with_chunks: bool) -> dict[int, tuple[Span, ...]]:
        """The decode rows of each slab, and its chunks."""
        if with_chunks not in self._spans:
            found = {group.slab_id: group.spans for group in self.decodes}
            for chunk in self.chunks if with_chunks else ():
                found[chunk.slab_id] = (*found.get(chunk.slab_id, ()), chunk.span)
            self._spans[with_chunks] = found
        return self._spans[with_chunks]

    def places_in(self, group: DecodeGroup, kv_heads: int, num_places: int) -> mx.array:
        """Where the group's new tokens go in a slab `[slots, kv_heads, places]`, counted from its
        beginning: `[num_tokens * kv_heads]`. With fewer places than tokens it consists of rings."""
        key = (group.slab_id, kv_heads, num_places)
        if key not in self._places:
            places = [
                (span.slot * kv_heads + head) * num_places + span.start % num_places
                for span in group.spans
                for head in range(kv_heads)
            ]
            self._places[key] = mx.array(places, mx.uint32)
        return self._places[key]

    def view_of(
        self, group: DecodeGroup, window: int | None, ring: int | None
    ) -> DecodeGroup | WindowView:
        """What the group's slots see of a layer that looks back `window` tokens."""
        if window is None:
            return group
        key = (group.slab_id, window, ring)
        if key not in self._views:
            self._views[key] = _window_view(group, window, ring, self.with_bias)
        return self._views[key]


def layout_of(plan: StepPlan, capacities: dict[int, int], with_bias: bool) -> StepLayout:
    """`capacities` gives each slab's capacity in tokens; `with_bias` makes the CPU's masks."""
    positions = [d.position for d in plan.decodes]
    for chunk in plan.prefills:
        positions.extend(range(chunk.start, chunk.start + len(chunk.token_ids)))
    return StepLayout(
        num_tokens=len(positions),
        offsets=mx.array(positions, mx.int32),
        decodes=_decode_groups(plan.decodes, capacities, with_bias),
        chunks=_chunk_spans(plan.prefills, len(plan.decodes)),
        with_bias=with_bias,
    )


def _decode_groups(
    decodes: tuple[DecodeRow, ...], capacities: dict[int, int], with_bias: bool
) -> tuple[DecodeGroup, ...]:
    groups = []
    first_token = 0
    for slab_id, rows in groupby(decodes, key=lambda d: d.slab_id):
        group = _decode_group(slab_id, list(rows), first_token, capacities[slab_id], with_bias)
        groups.append(group)
        first_token += group.num_tokens
    return tuple(groups)


def _decode_group(
    slab_id: int, rows: list[DecodeRow], first_token: int, capacity: int, with_bias: bool
) -> DecodeGroup:
    slots = [d.slot for d in rows]
    num_slots = slots[-1] + 1
    lengths = [0] * num_slots
    for d in rows:
        lengths[d.slot] = d.position + 1
    longest = max(lengths)
    length = min(capacity, -(-longest // LENGTH_STEP) * LENGTH_STEP)
    is_dense = num_slots == len(rows)
    visible = None
    if min(lengths) < length:
        visible = (mx.arange(length)[None] < mx.array(lengths)[:, None])[:, None, None]
    return DecodeGroup(
        slab_id=slab_id,
        first_token=first_token,
        num_tokens=len(rows),
        num_slots=num_slots,
        length=length,
        visible=visible,
        bias=mx.where(visible, 0.0, -mx.inf) if with_bias and visible is not None else None,
        queries=None if is_dense else _token_of_slot(slots, num_slots),
        answers=None if is_dense else mx.array(slots, mx.int32),
        last_positions=tuple(n - 1 for n in lengths),
    )


def _window_view(group: DecodeGroup, window: int, ring: int | None, with_bias: bool) -> WindowView:
    """In a ring, place `s` holds the last token whose position is `s` modulo the ring."""
    length = group.length if ring is None else min(group.length, ring)
    last = mx.array(group.last_positions, mx.int32)[:, None]
    age = last - mx.arange(length)[None]
    if ring is not None:
        age = age % ring
    visible = ((age >= 0) & (age < window) & (age <= last))[:, None, None]
    return WindowView(
        length=length,
        visible=visible,
        bias=mx.where(visible, 0.0, -mx.inf) if with_bias else None,
    )


def _token_of_slot(slots: list[int], num_slots: int) -> mx.array:
    """For each slot its token within the group; an idle slot borrows the first one."""
    tokens = [0] * num_slots
    for token, slot in enumerate(slots):
        tokens[slot] = token
    return mx.array(tokens, mx.int32)


def _chunk_spans(prefills: tuple[PrefillChunk, ...], first_token: int) -> tuple[ChunkSpan, ...]:
    spans = []
    for chunk in prefills:
        num_tokens = len(chunk.token_ids)
        spans.append(ChunkSpan(chunk.slab_id, chunk.slot, first_token, num_tokens, chunk.start))
        first_token += num_tokens
    return tuple(spans)
