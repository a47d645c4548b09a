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
from functools import cached_property
from itertools import groupby

import mlx.core as mx

from mlx_lm_server.core.plan import DecodeRow, PrefillChunk, StepPlan
from mlx_lm_server.runner.span_attention import Span

# Lengths of the KV read by decode rows are rounded up to this many tokens, so that the same
# shapes (and compiled functions) serve many steps.
LENGTH_STEP = 32


@dataclass(frozen=True)
class DecodeGroup:
    """The decode rows of one slab.

    Plain operations run over the slab's first `num_slots` slots and `length` positions, attention
    in C over the `spans`; each asks for what it needs.
    """

    slab_id: int
    first_token: int
    num_tokens: int
    length: int
    last_positions: tuple[int, ...]  # of each slot; -1 where it sits this step out

    @property
    def num_slots(self) -> int:
        return len(self.last_positions)

    @property
    def tokens(self) -> slice:
        return slice(self.first_token, self.first_token + self.num_tokens)

    @cached_property
    def spans(self) -> tuple[Span, ...]:
        places = [(slot, last) for slot, last in enumerate(self.last_positions) if last >= 0]
        return tuple(
            Span(slot, self.first_token + i, 1, last) for i, (slot, last) in enumerate(places)
        )

    @cached_property
    def queries(self) -> mx.array | None:
        """For each slot its token within the group, `[num_slots]`; an idle slot borrows the first
        one. None where they are the same, which they are unless a row sits this step out."""
        if self.num_slots == self.num_tokens:
            return None
        tokens = [0] * self.num_slots
        for span in self.spans:
            tokens[span.slot] = span.first_token - self.first_token
        return mx.array(tokens, mx.int32)

    @cached_property
    def answers(self) -> mx.array | None:
        """For each token its slot, `[num_tokens]`, or None as for `queries`."""
        if self.num_slots == self.num_tokens:
            return None
        return mx.array([span.slot for span in self.spans], mx.int32)


@dataclass(frozen=True)
class SlotsView:
    """What the slots of a decode group see of their first `length` places."""

    length: int
    visible: mx.array | None  # `[num_slots, 1, 1, length]`; None where all is

    @cached_property
    def bias(self) -> mx.array | None:
        """The same as 0 and -inf."""
        return None if self.visible is None else mx.where(self.visible, 0.0, -mx.inf)


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
    _views: dict[tuple[int, int | None, int | None], SlotsView] = field(default_factory=dict)
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

    def view_of(self, group: DecodeGroup, window: int | None, ring: int | None) -> SlotsView:
        """What the group's slots see of a layer that looks back `window` tokens, None for all."""
        key = (group.slab_id, window, ring)
        if key not in self._views:
            self._views[key] = _view(group, window, ring)
        return self._views[key]


def layout_of(plan: StepPlan, capacities: dict[int, int]) -> StepLayout:
    """`capacities` gives each slab's capacity in tokens."""
    positions = [d.position for d in plan.decodes]
    for chunk in plan.prefills:
        positions.extend(range(chunk.start, chunk.start + len(chunk.token_ids)))
    return StepLayout(
        num_tokens=len(positions),
        offsets=mx.array(positions, mx.int32),
        decodes=_decode_groups(plan.decodes, capacities),
        chunks=_chunk_spans(plan.prefills, len(plan.decodes)),
    )


def _decode_groups(
    decodes: tuple[DecodeRow, ...], capacities: dict[int, int]
) -> tuple[DecodeGroup, ...]:
    groups = []
    first_token = 0
    for slab_id, rows in groupby(decodes, key=lambda d: d.slab_id):
        group = _decode_group(slab_id, list(rows), first_token, capacities[slab_id])
        groups.append(group)
        first_token += group.num_tokens
    return tuple(groups)


def _decode_group(
    slab_id: int, rows: list[DecodeRow], first_token: int, capacity: int
) -> DecodeGroup:
    last_positions = [-1] * (rows[-1].slot + 1)
    for d in rows:
        last_positions[d.slot] = d.position
    longest = max(last_positions) + 1
    length = min(capacity, -(-longest // LENGTH_STEP) * LENGTH_STEP)
    return DecodeGroup(slab_id, first_token, len(rows), length, tuple(last_positions))


def _view(group: DecodeGroup, window: int | None, ring: int | None) -> SlotsView:
    """In a ring, place `s` holds the last token whose position is `s` modulo the ring."""
    length = group.length if ring is None else min(group.length, ring)
    if window is None and min(group.last_positions) + 1 >= length:
        return SlotsView(length, None)
    last = mx.array(group.last_positions, mx.int32)[:, None]
    age = last - mx.arange(length)[None]
    if ring is not None:
        age = age % ring
    visible = (age >= 0) & (age <= last)
    if window is not None:
        visible = visible & (age < window)
    return SlotsView(length, visible[:, None, None])


def _chunk_spans(prefills: tuple[PrefillChunk, ...], first_token: int) -> tuple[ChunkSpan, ...]:
    spans = []
    for chunk in prefills:
        num_tokens = len(chunk.token_ids)
        spans.append(ChunkSpan(chunk.slab_id, chunk.slot, first_token, num_tokens, chunk.start))
        first_token += num_tokens
    return tuple(spans)
