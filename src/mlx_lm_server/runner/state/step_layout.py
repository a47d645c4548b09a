"""How one forward's packed tokens map to slabs: computed once a step, used by every layer.

A forward gets all its tokens as one packed batch `[T, 1]`: first the decode rows, then the
prefill chunks, each chunk's tokens side by side.

    token   0   1   2   3   4 │ 5   6   7   8   9  10 │ 11  12
            ───────────────── │ ───────────────────── │ ──────
            decode rows       │ chunk of row 8        │ chunk of row 2
            slab 1    slab 4  │ positions 64 … 69     │ positions 0, 1
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import groupby
from typing import Any, NamedTuple, Protocol, TypeVar, cast

import mlx.core as mx

from mlx_lm_server.core.plan import RowWork, StepPlan

T = TypeVar("T")


class Span(NamedTuple):
    """Tokens side by side in the batch and in a slot, the first of them after `start` others. A
    single one may look back around the end of its slot, which is a ring then."""

    slot: int
    first_token: int
    num_tokens: int
    start: int


@dataclass(frozen=True)
class DecodeGroup:
    """The decode rows of one slab.

    Plain operations run over the slab's first `num_slots` slots and `length` positions, others over
    the `spans`; each asks for what it needs.
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
    _masks: dict[int, mx.array] = field(default_factory=dict)  # by number of heads
    _biases: dict[Hashable, mx.array] = field(default_factory=dict)  # by shape and type

    @cached_property
    def bias(self) -> mx.array | None:
        """The same as 0 and -inf."""
        return None if self.visible is None else mx.where(self.visible, 0.0, -mx.inf)

    def mask(self, num_heads: int) -> mx.array | None:
        """Returns what is seen by each head, `[num_slots, num_heads, 1, length]`: one array for all
        layers with so many."""
        if self.visible is None:
            return None
        if num_heads not in self._masks:
            num_slots, length = self.visible.shape[0], self.length
            shape = (num_slots, num_heads, 1, length)
            self._masks[num_heads] = mx.broadcast_to(self.visible, shape)
        return self._masks[num_heads]

    def bias_of(self, scores: mx.array) -> mx.array | None:
        """Returns what is to be added to scores `[num_slots, …, length]`, of their shape and type:
        one array for all layers that have such."""
        if self.bias is None:
            return None
        key = (scores.shape, scores.dtype)
        if key not in self._biases:
            self._biases[key] = mx.broadcast_to(self.bias.astype(scores.dtype), scores.shape)
        return self._biases[key]


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
    def spans(self) -> tuple[Span, ...]:
        return (Span(self.slot, self.first_token, self.num_tokens, self.start),)


Group = DecodeGroup | ChunkSpan


class StepArray(Protocol):
    """Names an array of numbers that layers need and that differs from step to step."""

    def of(self, layout: StepLayout) -> mx.array: ...


class Offsets(NamedTuple):
    """Each token's position, `[T]` int32, as RoPE wants it."""

    def of(self, layout: StepLayout) -> mx.array:
        return mx.array(layout.positions, mx.int32)


class Places(NamedTuple):
    """Where the new tokens of a group of decode rows go in a slab `[slots, kv_heads, places]`,
    counted from its beginning: `[num_tokens * kv_heads]`. With fewer places than tokens it consists
    of rings."""

    group: int  # among the layout's decode groups
    kv_heads: int
    num_places: int

    def of(self, layout: StepLayout) -> mx.array:
        places = [
            (span.slot * self.kv_heads + head) * self.num_places + span.start % self.num_places
            for span in layout.decodes[self.group].spans
            for head in range(self.kv_heads)
        ]
        return mx.array(places, mx.uint32)


@dataclass(frozen=True, slots=True)
class StepLayout:
    """What layers of a kind have in common is computed for the first and kept for the others."""

    positions: tuple[int, ...]  # of each token
    decodes: tuple[DecodeGroup, ...]
    chunks: tuple[ChunkSpan, ...]
    is_sealed: bool = False  # its arrays stand for those of other steps
    _arrays: dict[StepArray, mx.array] = field(default_factory=dict)
    _views: dict[tuple[int, int | None, int | None], SlotsView] = field(default_factory=dict)
    _kept: dict[Hashable, Any] = field(default_factory=dict)

    @property
    def num_tokens(self) -> int:
        return len(self.positions)

    @property
    def groups(self) -> tuple[Group, ...]:
        return (*self.decodes, *self.chunks)

    @property
    def slab_ids(self) -> tuple[int, ...]:
        """Each once, in the order of the groups."""
        return tuple(dict.fromkeys(group.slab_id for group in self.groups))

    @property
    def offsets(self) -> mx.array:
        return self.array(Offsets())

    @property
    def ends(self) -> mx.array:
        return self.offsets + 1

    def array(self, name: StepArray) -> mx.array:
        """Raises LookupError for one that a replayed forward is asked for and was not given."""
        if name not in self._arrays:
            if self.is_sealed:
                raise LookupError(f"{name} was not known when the forward was traced")
            self._arrays[name] = name.of(self)
        return self._arrays[name]

    @property
    def named_arrays(self) -> tuple[StepArray, ...]:
        """What was asked for so far."""
        return tuple(self._arrays)

    def sealed(self, arrays: Mapping[StepArray, mx.array]) -> StepLayout:
        """This layout with these arrays and no other."""
        return replace(self, is_sealed=True, _arrays=dict(arrays), _views={}, _kept={})

    def kept(self, key: Hashable, find: Callable[[], T]) -> T:
        """Returns what `find` gave when it was first asked for."""
        if key not in self._kept:
            self._kept[key] = find()
        return cast(T, self._kept[key])

    def view_of(self, group: DecodeGroup, window: int | None, ring: int | None) -> SlotsView:
        """What the group's slots see of a layer that looks back `window` tokens, None for all."""
        key = (group.slab_id, window, ring)
        if key not in self._views:
            self._views[key] = _view(group, window, ring)
        return self._views[key]


def layout_of(plan: StepPlan, capacities: dict[int, int], length_step: int = 1) -> StepLayout:
    """`capacities` gives each slab's capacity in tokens; lengths that decode rows read are rounded
    up to `length_step`."""
    positions = [decode.start for decode in plan.decodes]
    for chunk in plan.chunks:
        positions.extend(range(chunk.start, chunk.end))
    return StepLayout(
        positions=tuple(positions),
        decodes=_decode_groups(plan.decodes, capacities, length_step),
        chunks=_chunk_spans(plan.chunks, len(plan.decodes)),
    )


def _decode_groups(
    decodes: tuple[RowWork, ...], capacities: dict[int, int], length_step: int
) -> tuple[DecodeGroup, ...]:
    groups = []
    first_token = 0
    for slab_id, rows in groupby(decodes, key=lambda d: d.slab_id):
        works, capacity = list(rows), capacities[slab_id]
        longest = max(work.start for work in works) + 1
        length = min(capacity, -(-longest // length_step) * length_step)
        group = _decode_group(slab_id, works, first_token, length)
        groups.append(group)
        first_token += group.num_tokens
    return tuple(groups)


def _decode_group(slab_id: int, rows: list[RowWork], first_token: int, length: int) -> DecodeGroup:
    last_positions = [-1] * (rows[-1].slot + 1)
    for d in rows:
        last_positions[d.slot] = d.start
    return DecodeGroup(slab_id, first_token, len(rows), length, tuple(last_positions))


def _view(group: DecodeGroup, window: int | None, ring: int | None) -> SlotsView:
    """In a ring, place `s` holds the last token whose position is `s` modulo the ring."""
    length = group.length if ring is None else min(group.length, ring)
    lasts = [span.start for span in group.spans]
    if min(lasts) + 1 >= length and (window is None or max(lasts) < window):
        return SlotsView(length, None)  # what a slot sees that sits the step out is nobody's
    last = mx.array(group.last_positions, mx.int32)[:, None]
    age = last - mx.arange(length)[None]
    if ring is not None:
        age = age % ring
    visible = (age >= 0) & (age <= last)
    if window is not None:
        visible = visible & (age < window)
    return SlotsView(length, visible[:, None, None])


def _chunk_spans(chunks: tuple[RowWork, ...], first_token: int) -> tuple[ChunkSpan, ...]:
    spans = []
    for chunk in chunks:
        num_tokens = chunk.num_tokens
        spans.append(ChunkSpan(chunk.slab_id, chunk.slot, first_token, num_tokens, chunk.start))
        first_token += num_tokens
    return tuple(spans)
